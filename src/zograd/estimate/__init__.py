"""One estimate, from the parameters to the gradient; ``estimate.py`` is the file to read."""

"""The front door for functions: settings, autograd, the decorator."""

"""A task: the points, the function that it evaluates there, and the answer."""

"""The executor of a pool, the tasks that it sends, and the code that runs in its workers."""

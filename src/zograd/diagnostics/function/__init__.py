"""Questions about one function, a file each."""

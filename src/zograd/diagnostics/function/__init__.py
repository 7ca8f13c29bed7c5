"""What is asked of one function, question by question."""

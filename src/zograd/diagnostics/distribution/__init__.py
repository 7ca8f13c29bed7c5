"""What is asked of a family of directions."""

"""Checks of a family of directions."""

"""The import paths of other libraries."""

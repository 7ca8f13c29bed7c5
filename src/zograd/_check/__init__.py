"""What stands behind :mod:`zograd.diagnostics`: one call before trusting a setup."""

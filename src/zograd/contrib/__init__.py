"""Helpers for fields of use; each is a module of its own, and nothing else imports them."""

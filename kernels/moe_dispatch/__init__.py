"""Rows to their experts and back."""

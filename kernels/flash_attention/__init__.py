"""Exact attention without the score matrix."""

"""One product per group of rows."""

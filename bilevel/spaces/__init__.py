"""Trees of arrays as vectors."""

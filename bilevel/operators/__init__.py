"""Linear operators and what products reveal of them."""

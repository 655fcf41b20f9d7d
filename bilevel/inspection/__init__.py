"""The entries of a problem's arrays and derivatives on the host."""

"""Linear operators, and estimates of their spectra from products."""

"""Hyperparameter search and inner training by SciPy."""

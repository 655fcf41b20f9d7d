"""Hyperparameter search and inner training with SciPy."""

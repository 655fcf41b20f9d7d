"""Measurements of hypergradients by gradients only."""

"""Metagradients: time, memory and trust."""

"""Training steps whose runs can be differentiated."""

"""How right hypergradients are: against the derivative of a whole training run, and against retraining."""

"""Whether a hypergradient can be trusted, why not, and what to do."""

from bilevel.diagnosis.diagnose import diagnose

__all__ = ["diagnose"]

"""Checks of hypergradients, with causes of errors and remedies."""

from bilevel.diagnosis.diagnose import diagnose
from bilevel.diagnosis.finding import Finding
from bilevel.diagnosis.report import Diagnosis

__all__ = ["Diagnosis", "Finding", "diagnose"]

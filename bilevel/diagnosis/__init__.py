"""Whether a hypergradient can be trusted, why not, and what to do."""

from bilevel.diagnosis.diagnose import diagnose
from bilevel.diagnosis.findings import Finding
from bilevel.diagnosis.report import Diagnosis

__all__ = ["Diagnosis", "Finding", "diagnose"]

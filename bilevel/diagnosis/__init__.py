"""Checks of hypergradients, with causes of errors and remedies."""

from bilevel.diagnosis.diagnose import diagnose
from bilevel.diagnosis.finding import Finding
from bilevel.diagnosis.report import Diagnosis
from bilevel.diagnosis.training import diagnose_training
from bilevel.diagnosis.training_report import TrainingDiagnosis

__all__ = ["Diagnosis", "Finding", "TrainingDiagnosis", "diagnose", "diagnose_training"]

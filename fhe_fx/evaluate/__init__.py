"""How accurate a model remains when parts of it are encrypted: measured, with intervals."""

from fhe_fx.evaluate.metrics import METRICS, Estimate
from fhe_fx.evaluate.plot import plot_accuracy
from fhe_fx.evaluate.results import Evaluation, SettingResult, StageResult
from fhe_fx.evaluate.run import evaluate_submodule
from fhe_fx.evaluate.stages import STAGES
from fhe_fx.evaluate.texts import DataError, Texts, read_texts, sample_texts

__all__ = [
    "METRICS",
    "STAGES",
    "DataError",
    "Estimate",
    "Evaluation",
    "SettingResult",
    "StageResult",
    "Texts",
    "evaluate_submodule",
    "plot_accuracy",
    "read_texts",
    "sample_texts",
]

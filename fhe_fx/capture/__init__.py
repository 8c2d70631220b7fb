"""Tracing a model, and naming the part of it to encrypt."""

from fhe_fx.capture.between import submodule_between, submodules_of
from fhe_fx.capture.clear import clear_names, parameter_of
from fhe_fx.capture.export import capture, decompose, graph_of, graph_of_exported, program_of
from fhe_fx.capture.targets import is_model_itself, resolve_targets

__all__ = [
    "capture",
    "clear_names",
    "decompose",
    "graph_of",
    "graph_of_exported",
    "is_model_itself",
    "parameter_of",
    "program_of",
    "resolve_targets",
    "submodule_between",
    "submodules_of",
]

"""Tracing a model, and naming the part of it to encrypt."""

from fhe_fx.capture.between import submodule_between
from fhe_fx.capture.export import capture, decompose, graph_of, program_of
from fhe_fx.capture.targets import resolve_targets

__all__ = [
    "capture",
    "decompose",
    "graph_of",
    "program_of",
    "resolve_targets",
    "submodule_between",
]

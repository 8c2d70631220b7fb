"""Backends: `reference` defines what a program means, `concrete` runs it encrypted."""

from fhe_fx.backends.base import Backend, Circuit, CircuitFacts
from fhe_fx.backends.registry import backend_names, facts_by, get_backend, register_backend

__all__ = [
    "Backend",
    "Circuit",
    "CircuitFacts",
    "backend_names",
    "facts_by",
    "get_backend",
    "register_backend",
]

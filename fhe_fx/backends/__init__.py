"""Backends: `reference` defines what a program means, `concrete` runs it encrypted."""

from fhe_fx.backends.base import Backend, Circuit, CircuitFacts

__all__ = ["Backend", "Circuit", "CircuitFacts"]

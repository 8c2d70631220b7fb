"""The Concrete backend: an integer program as a TFHE circuit. Alone in importing Concrete."""

from fhe_fx.backends.concrete.circuit import ConcreteBackend, ConcreteCircuit

__all__ = ["ConcreteBackend", "ConcreteCircuit"]

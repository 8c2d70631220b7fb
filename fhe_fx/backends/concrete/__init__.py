"""The Concrete backend: an integer program as a TFHE circuit. Alone in importing Concrete."""

import warnings

with warnings.catch_warnings():
    # Concrete imports pkg_resources, which warns whoever imports it that it is deprecated.
    warnings.filterwarnings("ignore", message=".*pkg_resources.*")
    import concrete.fhe  # noqa: F401

from fhe_fx.backends.concrete.circuit import ConcreteBackend, ConcreteCircuit

__all__ = ["ConcreteBackend", "ConcreteCircuit"]

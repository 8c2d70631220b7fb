"""How fast this machine runs look-ups: a small circuit, compiled and really executed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from concrete import fhe

from fhe_fx.backends.concrete.folders import owned_folders

__all__ = ["Measured", "measure_look_ups"]


@dataclass(frozen=True)
class Measured:
    """One measurement."""

    look_ups: int
    bits: int
    complexity: float
    """The compiler's estimate of the work of one run."""
    keygen_seconds: float
    seconds: float
    """The faster of two runs, on all cores."""
    key_bytes: int
    """Of the keys that were made."""

    @property
    def rate(self) -> float:
        """Complexity units a second, on all cores."""
        return self.complexity / self.seconds

    @property
    def key_bytes_per_second(self) -> float:
        """Bytes of keys made in a second, on all cores."""
        return self.key_bytes / self.keygen_seconds


def measure_look_ups(look_ups: int = 128, bits: int = 6, p_error: float = 0.1) -> Measured:
    """Run `look_ups` look-ups of `bits` bits on encrypted integers, with keys of their own."""
    table = fhe.LookupTable([(3 * i + 1) % (1 << bits) for i in range(1 << bits)])
    compiler = fhe.Compiler(lambda x: table[x], {"x": "encrypted"})
    low, high = np.zeros(look_ups, np.int64), np.full(look_ups, (1 << bits) - 1, np.int64)
    with owned_folders() as keep:
        circuit = compiler.compile([low, high], p_error=p_error)
        keep(circuit.server)
    start = time.perf_counter()
    circuit.keygen()
    keygen_seconds = time.perf_counter() - start
    encrypted = circuit.encrypt(np.arange(look_ups) % (1 << bits))
    runs = []
    for _ in range(2):
        start = time.perf_counter()
        circuit.run(encrypted)
        runs.append(time.perf_counter() - start)
    key_bytes = circuit.size_of_bootstrap_keys + circuit.size_of_keyswitch_keys
    complexity = float(circuit.complexity)
    return Measured(look_ups, bits, complexity, keygen_seconds, min(runs), key_bytes)

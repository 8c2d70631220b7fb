"""What one look-up costs, before anything is compiled: a table asked of Concrete's optimizer.

`python benchmarks/lookup_cost.py --write` writes the table. Its unit is Concrete's complexity.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fhe_fx.quant.noise import noise_in_slots, p_error_of

__all__ = ["TABLE", "CostTable", "KeySize", "cost_table", "key_size", "lookup_cost"]

TABLE = Path(__file__).with_name("lookup_cost.json")
"""Where the table is kept."""


@dataclass(frozen=True)
class KeySize:
    """What the parameters of a look-up take."""

    key_bytes: int
    """Bootstrap and key-switching keys, as the server holds them."""
    words: int
    """64-bit words of one ciphertext."""


@dataclass(frozen=True)
class CostTable:
    """Complexity of a look-up, and the sizes of its parameters."""

    measured_on: str
    """Name and version of the optimizer."""
    p_errors: tuple[float, ...]
    """In rising order."""
    log_norms: tuple[float, ...]
    """Logarithms to base two of the 2-norm of the weights with which answers of look-ups are
    summed before the next one reads them, in rising order: how much noise arrives."""
    by_bits: dict[int, tuple[tuple[float, ...], ...]]
    """For each number of input bits and each of `log_norms`, the complexity at each of `p_errors`;
    infinite where no parameters of 128-bit security exist."""
    sizes_by_bits: dict[int, tuple[tuple[KeySize, ...], ...]]
    """Likewise what keys and ciphertexts take; nothing where no parameters exist."""

    def of(self, bits: int, p_error: float, log_norm: float = 0.0) -> float:
        """Return the complexity of a look-up in a circuit whose noisiest sum has such a norm.

        The norm is taken to the nearest of `log_norms`. Between two `p_errors` the cost follows the
        straight line through the logarithms. Beyond the last number of bits it is that of the last
        with the same noise: what is paid for is how little noise there is, in parts of the range.
        """
        known, p_error, norm = self._place(bits, p_error, log_norm)
        row = self.by_bits[known][norm]
        x = math.log(min(max(p_error, self.p_errors[0]), self.p_errors[-1]))
        ends = pairwise(zip(map(math.log, self.p_errors), map(math.log, row), strict=True))
        (x0, y0), (x1, y1) = next(pair for pair in ends if x <= pair[1][0] + 1e-12)
        if math.isinf(y0):  # no parameters exist at the smaller of the two
            return math.exp(y1) if x >= x1 - 1e-12 else math.inf
        return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))

    def size_of(self, bits: int, p_error: float, log_norm: float = 0.0) -> KeySize:
        """Return what its parameters take, at the nearest of `p_errors`, in logarithms."""
        known, p_error, norm = self._place(bits, p_error, log_norm)
        nearest = min(self.p_errors, key=lambda p: abs(math.log(p / p_error)))
        return self.sizes_by_bits[known][norm][self.p_errors.index(nearest)]

    def _place(self, bits: int, p_error: float, log_norm: float) -> tuple[int, float, int]:
        """Return known bits, the `p_error` with as much noise there, and the norm's number."""
        known = min(max(bits, min(self.by_bits)), max(self.by_bits))
        if bits > known:
            p_error = p_error_of(noise_in_slots(p_error) * 2.0 ** (known - bits))
        norm = min(range(len(self.log_norms)), key=lambda i: abs(self.log_norms[i] - log_norm))
        return known, p_error, norm


@functools.cache
def cost_table() -> CostTable:
    """Return the table that the compiler goes by."""
    data = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = {
        int(bits): tuple(tuple(math.inf if c is None else c for c in row) for row in block)
        for bits, block in data["complexity_by_bits"].items()
    }
    sizes = {
        int(bits): tuple(
            tuple(map(KeySize, *row))
            for row in zip(block, data["words_by_bits"][bits], strict=True)
        )
        for bits, block in data["key_bytes_by_bits"].items()
    }
    p_errors, log_norms = tuple(data["p_errors"]), tuple(data["log_norms"])
    return CostTable(data["measured_on"], p_errors, log_norms, rows, sizes)


@functools.cache
def lookup_cost(bits: int, p_error: float, log_norm: float = 0.0) -> float:
    """Return the complexity of a look-up that reads `bits` bits and errs with `p_error`.

    Args:
        bits: how many it reads.
        p_error: probability that it reads another entry.
        log_norm: of the noisiest sum of its circuit (`log_norm_of`).
    """
    return cost_table().of(bits, p_error, log_norm)


def key_size(bits: int, p_error: float, log_norm: float = 0.0) -> KeySize:
    """Return what keys and ciphertexts of a circuit of such look-ups take.

    Args:
        bits: how many a look-up reads.
        p_error: probability that it reads another entry.
        log_norm: of the noisiest sum of its circuit (`log_norm_of`).
    """
    return cost_table().size_of(bits, p_error, log_norm)

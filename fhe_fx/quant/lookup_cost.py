"""What one look-up costs, before anything is compiled: a table asked of Concrete's optimizer.

`python benchmarks/lookup_cost.py --write` writes the table. Its unit is Concrete's complexity.
"""

from __future__ import annotations

import bisect
import functools
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fhe_fx.quant.noise import noise_in_slots, p_error_of

__all__ = [
    "TABLE",
    "CostTable",
    "KeySize",
    "cost_table",
    "key_size",
    "lookup_cost",
    "uses_up_a_size",
]

TABLE = Path(__file__).with_name("lookup_cost.json")
"""Where the table is kept."""


_UNSEEN = 1.2
"""By how many bits the noise of answers has had to be smaller in front of results than the formula
behind `log_deviations_by_bits` says: heads and attention of 8 bits took a level of decomposition
more from there on."""
_ALIKE = 0.1
"""By how many bits a norm may be above one of the table and still be priced like it."""


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
    log_deviations_by_bits: dict[int, tuple[tuple[float, ...], ...]]
    """Likewise log2 of the standard deviation of the noise of an answer, in parts of the torus."""

    def of(self, bits: int, p_error: float, log_norm: float = 0.0) -> float:
        """Return the complexity of a look-up in a circuit whose noisiest sum has such a norm.

        The norm is taken up to the next of `log_norms`; for an infinite one there is no price.
        Between two `p_errors` the cost follows the straight line through the logarithms. Beyond the
        last number of bits it is that of the last with the same noise: what is paid for is how
        little noise there is, in parts of the range.
        """
        if math.isinf(log_norm):
            return math.inf
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
        return self.sizes_by_bits[known][norm][self._nearest(p_error)]

    def norm_for_results(
        self, bits: int, p_error: float, look_ups: float, results: float, result_bits: float
    ) -> float:
        """Return the norm of sums for which parameters leave results exact enough, too.

        What a look-up reads has besides the noise of switching the key and of rounding the mask,
        which is greater; a result has that of answers alone.

        Args:
            bits: that a look-up reads.
            p_error: probability that it reads another entry, or a result is another.
            look_ups: log2 of the norm of the noisiest sum that is read: the least that is returned.
            results: the same of results.
            result_bits: that they are rounded to.

        Returns:
            One of `log_norms`, or `look_ups`; infinite if no parameters do.
        """
        known, at_known, place = self._place(bits, p_error, look_ups)
        column = self._nearest(at_known)
        # Answers are encoded below a bit of padding.
        allowed = math.log2(noise_in_slots(p_error)) - result_bits - 1 - _UNSEEN
        for row in range(place, len(self.log_norms)):
            if self.log_deviations_by_bits[known][row][column] + results <= allowed:
                return look_ups if row == place else self.log_norms[row]
        return math.inf

    def _nearest(self, p_error: float) -> int:
        """Return the number of the nearest of `p_errors`, in logarithms."""
        p_error = max(p_error, self.p_errors[0])
        return min(
            range(len(self.p_errors)), key=lambda i: abs(math.log(self.p_errors[i] / p_error))
        )

    def _place(self, bits: int, p_error: float, log_norm: float) -> tuple[int, float, int]:
        """Return known bits, the `p_error` with as much noise there, and the norm's number."""
        known = min(max(bits, min(self.by_bits)), max(self.by_bits))
        if bits > known:
            p_error = p_error_of(noise_in_slots(p_error) * 2.0 ** (known - bits))
        last = len(self.log_norms) - 1
        norm = min(bisect.bisect_left(self.log_norms, log_norm - _ALIKE), last)
        return known, p_error, norm


def uses_up_a_size(p_error: float) -> bool:
    """Say whether a look-up is misread as seldom as its polynomial size can do.

    Switching the key and rounding the mask then make nearly all the noise that is allowed, and how
    little may arrive besides hangs on the rest of the circuit.
    """
    return 0.4 < p_error < 0.6


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
    deviations = {
        int(bits): tuple(tuple(row) for row in block)
        for bits, block in data["log_deviation_by_bits"].items()
    }
    p_errors, log_norms = tuple(data["p_errors"]), tuple(data["log_norms"])
    return CostTable(data["measured_on"], p_errors, log_norms, rows, sizes, deviations)


@functools.cache
def lookup_cost(bits: int, p_error: float, log_norm: float = 0.0) -> float:
    """Return the complexity of a look-up that reads `bits` bits and errs with `p_error`.

    Args:
        bits: how many it reads.
        p_error: probability that it reads another entry.
        log_norm: of the noisiest sum of its circuit (`NoiseLevel.at`).
    """
    return cost_table().of(bits, p_error, log_norm)


def key_size(bits: int, p_error: float, log_norm: float = 0.0) -> KeySize:
    """Return what keys and ciphertexts of a circuit of such look-ups take.

    Args:
        bits: how many a look-up reads.
        p_error: probability that it reads another entry.
        log_norm: of the noisiest sum of its circuit (`NoiseLevel.at`).
    """
    return cost_table().size_of(bits, p_error, log_norm)

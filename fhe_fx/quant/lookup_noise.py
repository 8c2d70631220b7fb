"""The noise that a bootstrap reads with, as it acts on integers.

A ciphertext holds its message in slots, and a look-up errs when noise moves it by more than half a
slot. Concrete's optimizer chooses parameters so that this happens with probability `p_error` at
most, for a Gaussian noise: p = P(|e| > 1/2) = erfc(1 / (2 sqrt(2) s)), s in slots (Bergerat et al.
2023, "Parameter optimization and larger precision for (T)FHE", section 2.4).

Behind an approximate rounding the slot is that of the rounded value, and a message stands anywhere
in it, so its neighbour is read more often than `p_error` says: near a border a little noise is
enough. It is one more unbiased rounding.

Every look-up gets the noise of the worst one here; the real ones have at most that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fhe_fx.quant.noise import noise_in_slots

__all__ = ["LookupNoise"]


@dataclass(frozen=True)
class LookupNoise:
    """Gaussian noise on what look-ups read, and on what results are rounded from."""

    deviation: float
    """Standard deviation, in slots: in units of 2**lsbs."""
    generator: torch.Generator = field(default_factory=torch.Generator, repr=False)
    """Where it comes from; it advances with every look-up."""
    saturates: bool = False
    """Keep noise from pushing a value past the ends of its table. Encryption does not; without
    the values that wrap, what is left is the error that the noise should make."""
    reaches_results: bool = True
    """Whether results have it, too, as large beside a slot as in front of a look-up: the most that
    they can have, and more than they do where nothing multiplies the answers."""

    @staticmethod
    def of(p_error: float, seed: int = 0, *, saturates: bool = False) -> LookupNoise:
        """Return the noise with which a look-up at the middle of a slot errs as often as stated.

        Args:
            p_error: probability that a look-up reads another entry, 0 < p_error < 1.
            seed: of the noise.
            saturates: see the field.
        """
        return LookupNoise(noise_in_slots(p_error), torch.Generator().manual_seed(seed), saturates)

    def displace(self, x: Tensor, lsbs: int) -> Tensor:
        """Add noise to accumulators, in slots of `2**lsbs`."""
        slots = torch.randn(x.shape, generator=self.generator) * self.deviation
        return x + (slots * float(1 << lsbs)).round().long()

    def disturb(self, x: Tensor, bits: int, lsbs: int) -> Tensor:
        """Add noise to accumulators that a look-up of `bits` bits reads, `lsbs` bits above."""
        noisy = self.displace(x, lsbs)
        if not self.saturates:
            return noisy
        # The outermost integers that still round to an entry, or where the value already was.
        low, high = _ends(bits, lsbs)
        return noisy.maximum(x.clamp(max=low)).minimum(x.clamp(min=high))


def _ends(bits: int, lsbs: int) -> tuple[int, int]:
    half_slot = (1 << lsbs) // 2
    return -(1 << bits - 1 + lsbs) - half_slot, (1 << bits - 1 + lsbs) - half_slot - 1

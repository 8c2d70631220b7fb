"""How well values fill the slots of the look-ups that read them.

Values that share a scale may be read in different ranges. A look-up multiplies what it reads by a
whole number, to fill its encoding: where one or two is the most that fits, up to half of the
encoding stays empty, and slots are as much wider than they have to be. Stretching the scale lets
other whole numbers fit better. It costs noise: all that is read is a smaller part of its encoding
before it is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Filling", "Reads"]

_STEPS = 8
"""Stretches that are tried, to a doubling."""


@dataclass(frozen=True)
class Reads:
    """Every element that a look-up reads, `[n]` each."""

    class_of: Tensor
    """The number of its class."""
    room: Tensor
    """The encoding, in parts of the range that was chosen for the element, float64."""
    norm: Tensor
    """Squared norm of the weights with which answers of look-ups arrive in it, float64."""
    error: Tensor
    """What the look-up adds to the results' variance where it fills its slots, float64."""

    def stretched(self, stretch: float, n_classes: int) -> tuple[Tensor, Tensor]:
        """Return error and greatest squared norm of every class, as its look-ups read it."""
        room = self.room * stretch
        times = room.floor().clamp_min(1)
        error = torch.zeros(n_classes, dtype=torch.float64)
        error.scatter_add_(0, self.class_of, self.error * (room / times).square())
        norm = torch.zeros(n_classes, dtype=torch.float64)
        norm.scatter_reduce_(0, self.class_of, self.norm * times.square(), "amax")
        return error, norm


@dataclass(frozen=True)
class Filling:
    """The stretch of every class, and by how many bits its encoding is to be wider for it."""

    stretch: Tensor
    """`[n_classes]`, at least 1."""
    wider: dict[int, int]
    """By encoding."""
    error: float
    """What all look-ups then add to the results' variance."""

    @staticmethod
    def best(
        reads: Reads,
        classes_of: dict[int, Tensor],
        held: Tensor,
        bound: Tensor,
        most_bits: dict[int, int],
        norm: float,
    ) -> Filling:
        """Return what errs least while no look-up reads more noise.

        Args:
            reads: what is read.
            classes_of: the classes of each encoding, `[n_classes]`, bool.
            held: those whose scale may not be stretched. They keep theirs, and are a smaller part
                of an encoding that becomes wider.
            bound: those that read as many times the noise as their encoding becomes wider.
            most_bits: by how many bits an encoding may become wider.
            norm: squared; the most that any look-up may read, except where one does already.
        """
        n_classes = len(held)
        bits = max(most_bits.values(), default=0)
        tries = [2.0 ** (k / _STEPS) for k in range(bits * _STEPS + 1)]
        errors, norms = map(
            torch.stack, zip(*(reads.stretched(t, n_classes) for t in tries), strict=True)
        )
        is_noisy = norms > torch.maximum(norms[0], torch.tensor(norm, dtype=torch.float64))
        errors[is_noisy] = torch.inf
        stretch, wider, total = torch.ones(n_classes, dtype=torch.float64), {}, 0.0
        for number, own in classes_of.items():
            best = None
            for k in range(most_bits[number] + 1):
                if bool(is_noisy[k * _STEPS, own & bound].any()):
                    break
                least, place = errors[: k * _STEPS + 1, own].min(0)
                place[held[own]] = k * _STEPS
                least = torch.where(held[own], errors[k * _STEPS, own], least)
                found = float(least.sum()), k, place
                if best is None or found[0] < best[0]:
                    best = found
            assert best is not None
            total += best[0]
            wider[number] = best[1]
            stretch[own] = torch.tensor(tries, dtype=torch.float64)[best[2]]
        return Filling(stretch, wider, total)

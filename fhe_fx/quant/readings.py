"""How often look-ups are read, where the mean of several readings errs less than one.

The noise of a bootstrap comes from switching keys and rounding the mask of what it reads. Behind
another mask, which an encrypted zero added to it makes, it is another noise; so the mean of several
readings has its variance divided by how many there are. That costs as many look-ups; but the few
that make most of the error, as those of a softmax do, are read four times for a few per cent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Readings"]


class _Step(NamedTuple):
    group: int
    gain: float
    """By how much the squared error falls."""
    price: float
    """By how much the cost rises."""


@dataclass(frozen=True)
class Readings:
    """In which order groups of look-ups are read once more, the most useful step first."""

    steps: tuple[_Step, ...]
    n_groups: int
    errors: tuple[float, ...]
    """Squared error of all groups together after the first so many steps, falling."""
    costs: tuple[float, ...]
    """Likewise what they cost, rising."""

    @staticmethod
    def of(errors: Sequence[float], costs: Sequence[float], most: Sequence[int]) -> Readings:
        """Order the steps by what they save for their price.

        Args:
            errors: squared error of each group, read once.
            costs: of each group, read once.
            most: how often each may be read.
        """
        steps = [
            _Step(i, error / (k * (k + 1)), cost)
            for i, (error, cost) in enumerate(zip(errors, costs, strict=True))
            for k in range(1, most[i])
        ]
        steps.sort(key=lambda s: -s.gain / s.price)  # stable: of one group, in order
        return Readings(
            tuple(steps),
            len(errors),
            tuple(itertools.accumulate((-s.gain for s in steps), initial=sum(errors))),
            tuple(itertools.accumulate((s.price for s in steps), initial=sum(costs))),
        )

    def worthwhile(self, exchange: float) -> int:
        """Return after how many steps one more is not worth its price.

        Args:
            exchange: parts of the squared error that a part of the cost has to save.
        """
        for n, step in enumerate(self.steps):
            if step.gain * self.costs[n] < exchange * step.price * self.errors[n]:
                return n
        return len(self.steps)

    def counts(self, n_steps: int) -> list[int]:
        """Return how often each group is read after the first steps."""
        found = [1] * self.n_groups
        for step in self.steps[:n_steps]:
            found[step.group] += 1
        return found

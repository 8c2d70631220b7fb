"""Searches the ends of a range for the least error on samples that did not decide where they lie.

The extreme values of a class decide where its range ends, so on the samples that they are among
next to nothing lies outside, and any room looks wasted. So each sample is held against the ends
that the others lead to (`left_out`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fhe_fx.quant.left_out import ends_without

__all__ = ["RangeSearch"]


@dataclass(frozen=True)
class RangeSearch:
    """Tries each end at several places, class by class."""

    squares_of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """Squared errors `[n, numel]` of the values, given low and high ends `[n_ends, n_classes]`,
    which of them each sample meets, `[n]`, and which values meet the last instead, `[n, numel]`."""
    column: Tensor
    """Class of every element, of any shape."""
    values: Tensor
    """What the samples whose errors are known read, `[n, numel]`."""
    weight: Tensor
    """Of their errors, `[n]`."""
    fold_of_values: Tensor
    """Of these samples; where it has fewer, the rest were not among those that decide."""
    low: Tensor
    """Least value of each sample in each class, `[n_samples, n_classes]`."""
    high: Tensor
    """Greatest one."""
    fold: Tensor
    """Of each sample, as `fold_numbers` gives them."""

    def ends(self, rooms: Sequence[float], usual: float, shared: float) -> tuple[Tensor, Tensor]:
        """Return the ends of least error, `[2, n_classes]`, and those without each fold.

        Args:
            rooms: how far beyond the observed range an end may lie, in parts of that range.
            usual: how far it lies where no place is better.
            shared: weight of the mean error of all classes beside a class's own.

        Returns:
            The ends; and `[n_folds, 2, n_classes]`: with the same rooms about what the samples
            without one fold reach.
        """
        low, high = (end.unsqueeze(0) for end in (self.low.amin(0), self.high.amax(0)))
        least, greatest = ends_without(self.low, self.high, self.fold)
        lows, highs = torch.cat([least, low]), torch.cat([greatest, high])
        spans = highs - lows
        most = max(*rooms, usual)
        which = torch.full((len(self.values),), len(least))
        which[: len(self.fold_of_values)] = self.fold_of_values
        is_far = self._is_far(lows - most * spans, highs + most * spans)
        column = self.column.reshape(-1)
        best = torch.full_like(low[0], torch.inf)
        below, above = torch.full_like(best, usual), torch.full_like(best, usual)
        # Both ends together: where a value wraps at one end depends on the other.
        for one, other in [(usual, usual), *itertools.product(rooms, repeat=2)]:
            squares = self.squares_of(lows - one * spans, highs + other * spans, which, is_far)
            error = torch.zeros_like(best).scatter_add(0, column, (self.weight @ squares).double())
            error += shared * error.mean()
            is_better = error < best
            best = torch.where(is_better, error, best)
            below, above = below.masked_fill(is_better, one), above.masked_fill(is_better, other)
        ends = torch.stack([lows - below * spans, highs + above * spans], 1)
        return ends[-1], ends[:-1]

    def _is_far(self, low: Tensor, high: Tensor) -> Tensor:
        """Say which values lie beyond the ends without their samples' folds whatever the room is.

        They meet the ends of all samples. How far off their like will be no room can tell, but they
        should be inside themselves.
        """
        column, n = self.column.reshape(-1), len(self.fold_of_values)
        low, high = (end[:, column].float()[self.fold_of_values] for end in (low, high))
        is_far = torch.zeros(self.values.shape, dtype=torch.bool)
        is_far[:n] = (self.values[:n] < low) | (self.values[:n] >= high)
        return is_far

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

    squares_of: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Squared errors `[n, numel]` of the values, given low and high ends `[n_ends, n_classes]` and
    which of them each value meets, `[n, numel]`."""
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
        which = self._which(lows - most * spans, highs + most * spans)
        column = self.column.reshape(-1)
        best = torch.full_like(low[0], torch.inf)
        below, above = torch.full_like(best, usual), torch.full_like(best, usual)
        # Both ends together: where a value wraps at one end depends on the other.
        for one, other in [(usual, usual), *itertools.product(rooms, repeat=2)]:
            squares = self.squares_of(lows - one * spans, highs + other * spans, which)
            error = torch.zeros_like(best).scatter_add(0, column, (self.weight @ squares).double())
            error += shared * error.mean()
            is_better = error < best
            best = torch.where(is_better, error, best)
            below, above = below.masked_fill(is_better, one), above.masked_fill(is_better, other)
        ends = torch.stack([lows - below * spans, highs + above * spans], 1)
        return ends[-1], ends[:-1]

    def _which(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the ends that each value meets: those without its sample's fold, or the last.

        These are of all samples, for a value that lies beyond the others whatever the room is. How
        far off its like will be no room can tell, but it should be inside itself.
        """
        column, last, n = self.column.reshape(-1), len(low) - 1, len(self.fold_of_values)
        low, high = (end[:, column][self.fold_of_values].float() for end in (low, high))
        is_near = (self.values[:n] >= low) & (self.values[:n] < high)
        which = torch.full(self.values.shape, last)
        which[:n] = torch.where(is_near, self.fold_of_values.unsqueeze(1), last)
        return which

"""Searches the ends of a range for the least error, with all samples and without some of them."""

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

    squares_of: Callable[[Tensor, Tensor], Tensor]
    """Squared errors `[n, numel]` with a low and a high end for each class."""
    column: Tensor
    """Class of every element, of any shape."""
    low: Tensor
    """Least value of each sample in each class, `[n_samples, n_classes]`."""
    high: Tensor
    """Greatest one."""
    weight: Tensor
    """Of the n samples whose errors are known, `[n]`."""
    fold: Tensor
    """Of each sample, as `fold_numbers` gives them."""
    fold_of_error: Tensor
    """Of the n samples whose errors are known."""

    def ends(self, rooms: Sequence[float], usual: float) -> tuple[Tensor, Tensor]:
        """Return the ends of least error, `[2, n_classes]`, and those without each fold.

        Args:
            rooms: how far beyond the observed range an end may lie, in parts of that range.
            usual: how far it lies where no place is better.

        Returns:
            The ends; and `[n_folds, 2, n_classes]`: what the samples without one fold would lead
            to. There both ends are tried together as for all samples, but where a fold alone
            reaches so far: that end is tried again, from where the others reach.
        """
        low, high = self.low.amin(0), self.high.amax(0)
        span = high - low
        best = _Best(self.weight.unsqueeze(0), self.column, len(low))
        without = _Best(self._weights(), self.column, len(low))
        # Both ends together: where a value wraps at one end depends on the other.
        for below, above in [(usual, usual), *itertools.product(rooms, repeat=2)]:
            squares = self.squares_of(low - below * span, high + above * span)
            best.offer((below, above), squares)
            without.offer((below, above), squares)
        ends = torch.stack([low - best.rooms[0][0] * span, high + best.rooms[1][0] * span])
        others = torch.stack([low - without.rooms[0] * span, high + without.rooms[1] * span], 1)
        chosen = best.rooms[0][0], best.rooms[1][0]
        for side, farthest in enumerate((self.low.argmin(0), self.high.argmax(0))):
            fold = self.fold[farthest].unsqueeze(0)
            again = self._without_farthest(side, fold, chosen, (usual, *rooms))
            others[:, side] = others[:, side].scatter(0, fold, again.unsqueeze(0))
        return ends, others

    def _weights(self) -> Tensor:
        """Return the weights without each fold, `[n_folds, n]`."""
        folds = torch.arange(int(self.fold.max()) + 1).unsqueeze(1)
        if len(folds) == 1:
            return self.weight.unsqueeze(0)
        return self.weight * (self.fold_of_error != folds)

    def _without_farthest(
        self, side: int, fold: Tensor, chosen: tuple[Tensor, Tensor], rooms: Sequence[float]
    ) -> Tensor:
        """Search one end again, without the fold of each class that reaches farthest there."""
        low, high = (e.gather(0, fold)[0] for e in ends_without(self.low, self.high, self.fold))
        span = high - low
        weights = self._weights()[fold[0]][self.column.reshape(-1)].T.float()
        column = self.column.reshape(-1)
        found = torch.zeros_like(low)
        least = torch.full_like(low, torch.inf)
        for room in rooms:
            ends = [low - chosen[0] * span, high + chosen[1] * span]
            ends[side] = high + room * span if side else low - room * span
            squares = (weights * self.squares_of(*ends)).sum(0).double()
            error = torch.zeros_like(low).scatter_add(0, column, squares)
            found = torch.where(error < least, ends[side], found)
            least = torch.minimum(error, least)
        return found


class _Best:
    """The rooms at which each class errs least, by several weightings of the samples."""

    def __init__(self, weights: Tensor, column: Tensor, n_classes: int) -> None:
        self.weights = weights.float()
        self.column = column.reshape(1, -1).expand(len(weights), -1)
        self.least = torch.full((len(weights), n_classes), torch.inf, dtype=torch.float64)
        self.rooms = [torch.zeros_like(self.least), torch.zeros_like(self.least)]
        """Below and above, `[n_weightings, n_classes]`."""

    def offer(self, rooms: tuple[float, float], squares: Tensor) -> None:
        """Take rooms where squared errors, `[n, numel]`, are less than with others."""
        weighted = (self.weights @ squares).double()
        found = torch.zeros_like(self.least).scatter_add(1, self.column, weighted)
        is_better = found < self.least
        self.least = torch.where(is_better, found, self.least)
        for i, room in enumerate(rooms):
            self.rooms[i] = self.rooms[i].masked_fill(is_better, room)

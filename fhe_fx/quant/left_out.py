"""The ends of ranges as they would lie, had some of the calibration samples not been seen.

The most extreme calibration values decide where a range ends, so on the calibration samples
themselves next to nothing is outside, whatever is to come. What a new input meets is what a sample
meets in the range of the others: cross-validation (Stone 1974, "Cross-validatory choice and
assessment of statistical predictions"), with samples left out in folds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ends", "ends_without", "fold_numbers"]

_FOLDS = 16
"""As many folds at most. Without one, a sixteenth of the samples is missing, and about as much more
lies outside: an estimate errs by that to the safe side."""


def fold_numbers(n_samples: int, step: int = 1) -> Tensor:
    """Return the fold that each sample is in, `[n_samples]`.

    Args:
        n_samples: how many there are.
        step: of so many in a row one decides more than the others do; these are dealt out evenly.
    """
    deciding = -(-n_samples // step)
    return torch.arange(n_samples) // step % min(_FOLDS, deciding)


def ends_without(low: Tensor, high: Tensor, fold: Tensor) -> tuple[Tensor, Tensor]:
    """Return least and greatest values without each fold, `[n_folds, n]` each.

    Args:
        low: least value of each sample, `[n_samples, n]`.
        high: greatest one.
        fold: as `fold_numbers` gives them; a single one is not left out.
    """
    n_folds = int(fold.max()) + 1
    if n_folds == 1:
        return low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    kept = [fold != k for k in range(n_folds)]
    return (
        torch.stack([low[is_kept].amin(0) for is_kept in kept]),
        torch.stack([high[is_kept].amax(0) for is_kept in kept]),
    )


@dataclass(frozen=True)
class Ends:
    """Where the range of every element ends, in the units of its place."""

    low: float
    """Values below it are outside, of every element."""
    high: float
    """Values from it on are outside."""
    fold: Tensor
    """Of each sample."""
    inward: Tensor
    """How much farther in the low and the high end would lie without each fold,
    `[n_folds, 2, *shape]`."""

    def without(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return low and high ends without the folds of some samples, `[n, *shape]`, float64.

        They are one unit apart at least, also where the other samples are all alike.
        """
        inward = self.inward[self.fold[samples]].double()
        low = self.low + inward[:, 0]
        return low, torch.maximum(self.high - inward[:, 1], low + 1)

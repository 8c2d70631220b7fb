"""Ends without some of the samples, against doing without them."""

from __future__ import annotations

import torch
from torch import Tensor

from fhe_fx.quant.left_out import Ends, ends_without, fold_numbers

N, CLASSES, ROWS = 40, 6, 3


def _values(n: int = N) -> Tensor:
    """Return `[n, ROWS, CLASSES]`, whose columns are classes."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn((n, ROWS, CLASSES), generator=generator, dtype=torch.float64)


def test_folds_are_even_and_those_that_decide_are_dealt_out() -> None:
    assert fold_numbers(3).tolist() == [0, 1, 2]
    assert set(torch.bincount(fold_numbers(80)).tolist()) == {5}
    deciding = fold_numbers(64, step=4)[::4]
    assert deciding.tolist() == list(range(16))
    assert fold_numbers(1).tolist() == [0]


def test_extremes_without_a_fold_are_those_of_the_others() -> None:
    values, fold = _values(), fold_numbers(N)
    low, high = ends_without(values.amin(1), values.amax(1), fold)
    for k in range(16):
        others = values[fold != k].flatten(0, 1)
        assert torch.equal(low[k], others.amin(0))
        assert torch.equal(high[k], others.amax(0))
    alone = ends_without(values[:1].amin(1), values[:1].amax(1), fold_numbers(1))
    assert torch.equal(alone[0], values[:1].amin(1)), "a single sample is not left out"


def test_ends_move_for_the_samples_of_their_fold_alone() -> None:
    inward = torch.zeros((2, 2, 3), dtype=torch.float64)
    inward[1, 0, 2], inward[1, 1, 2] = 5.0, 2.0
    ends = Ends(-8.5, 7.5, torch.tensor([0, 1, 0]), inward)
    low, high = ends.without(torch.tensor([1, 2]))
    assert low.tolist() == [[-8.5, -8.5, -3.5], [-8.5, -8.5, -8.5]]
    assert high.tolist() == [[7.5, 7.5, 5.5], [7.5, 7.5, 7.5]]
    inward[1, 0, 2] = 100.0
    low, high = ends.without(torch.tensor([1]))
    assert float(high[0, 2] - low[0, 2]) == 1.0, "what is left of a range is one unit"

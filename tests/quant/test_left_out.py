"""Ranges without some of the samples, against doing without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fhe_fx.quant.left_out import Ends, ends_without, fold_numbers
from fhe_fx.quant.range_search import RangeSearch

N, CLASSES, ROWS = 40, 6, 3
ROOMS, USUAL = (-0.3, -0.1, 0.0, 0.2), 0.05


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


def _search(values: Tensor, fold: Tensor, both_at_once: bool) -> tuple[Tensor, Tensor]:
    """Search ends where a value beyond one errs by its distance, and a wide range costs."""
    column = torch.arange(CLASSES).expand(ROWS, CLASSES)

    def squares_of(low: Tensor, high: Tensor) -> Tensor:
        below, above = (low[column] - values).clamp_min(0), (values - high[column]).clamp_min(0)
        room = (high - low)[column] if both_at_once else high[column] ** 2 + low[column] ** 2
        return (4 * (below + above) ** 2 + 0.02 * room.expand(values.shape)).flatten(1).float()

    search = RangeSearch(
        squares_of, column, values.amin(1), values.amax(1), torch.ones(len(values)), fold, fold
    )
    return search.ends(ROOMS, USUAL)


@pytest.mark.parametrize("both_at_once", [False, True])
def test_ends_without_a_fold_are_those_that_the_others_choose(both_at_once: bool) -> None:
    values, fold = _values(), fold_numbers(N)
    ends, without = _search(values, fold, both_at_once)
    missed, moved = 0.0, 0.0
    for k in range(16):
        others = values[fold != k]
        expected, _ = _search(others, torch.zeros(len(others), dtype=torch.int64), both_at_once)
        missed += float((without[k] - expected).square().sum())
        moved += float((ends - expected).square().sum())
    # Not exact: where a fold reaches farthest at one end, the room at the other is kept.
    assert moved > 0.1
    assert missed < 0.2 * moved

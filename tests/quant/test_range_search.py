"""Ranges of least error on values that did not decide where they end."""

from __future__ import annotations

import torch
from torch import Tensor

from fhe_fx.quant.left_out import ends_without, fold_numbers
from fhe_fx.quant.range_search import RangeSearch

CLASSES, ROWS = 6, 3
ROOMS, USUAL = (-0.2, -0.1, 0.0, 0.1, 0.2, 0.4), 0.05
PRICE = 0.001


def _values(n: int, seed: int = 4) -> Tensor:
    """Return normal values `[n, ROWS, CLASSES]`, whose columns are classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, ROWS, CLASSES), generator=generator, dtype=torch.float64)


def _errors(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return squared errors: twice the distance beyond an end, and the price of a wide range."""
    beyond = (low - values).clamp_min(0) + (values - high).clamp_min(0)
    return (2 * beyond).square() + PRICE * (high - low).square()


def _search(values: Tensor, shared: float) -> tuple[Tensor, Tensor]:
    column = torch.arange(CLASSES).expand(ROWS, CLASSES)
    flat, fold = values.flatten(1), fold_numbers(len(values))

    def squares_of(low: Tensor, high: Tensor, which: Tensor, is_far: Tensor) -> Tensor:
        all_ends = (end[:, column.reshape(-1)] for end in (low, high))
        ends = (torch.where(is_far, end[-1], end[which]) for end in all_ends)
        return _errors(flat, *ends).float()

    search = RangeSearch(
        squares_of, column, flat.float(), torch.ones(len(values)), fold, values.amin(1),
        values.amax(1), fold,
    )  # fmt: skip
    return search.ends(ROOMS, USUAL, shared)


def test_ends_are_better_on_new_values_than_those_that_the_same_values_would_choose() -> None:
    ours = theirs = 0.0
    new = _values(4000, seed=5)
    for seed in range(10):
        values = _values(24, seed)
        low, high = _search(values, 4.0)[0]
        ours += float(_errors(new, low, high).mean())
        bottom, top = values.amin((0, 1)), values.amax((0, 1))
        tried = {
            (a, b): _errors(values, bottom - a * (top - bottom), top + b * (top - bottom)).mean(
                (0, 1)
            )
            for a in ROOMS
            for b in ROOMS
        }
        for column in range(CLASSES):  # each class by its own values, which lie inside
            a, b = min(tried, key=lambda rooms: float(tried[rooms][column]))
            span = top[column] - bottom[column]
            ends = bottom[column] - a * span, top[column] + b * span
            theirs += float(_errors(new[..., column], *ends).mean()) / CLASSES
    assert ours < 0.9 * theirs


def test_ends_without_a_fold_have_the_same_room_about_what_the_others_reach() -> None:
    values = _values(40)
    (low, high), others = _search(values, 4.0)
    bottom, top = values.amin((0, 1)), values.amax((0, 1))
    rooms = torch.stack([(bottom - low) / (top - bottom), (high - top) / (top - bottom)])
    least, greatest = ends_without(values.amin(1), values.amax(1), fold_numbers(40))
    span = greatest - least
    expected = torch.stack([least - rooms[0] * span, greatest + rooms[1] * span], 1)
    torch.testing.assert_close(others, expected)


def test_classes_share_what_they_show_of_rare_values() -> None:
    values = _values(24)
    alone = _search(values, 0.0)[0]
    together = _search(values, 1e6)[0]
    spans = (values.amax((0, 1)) - values.amin((0, 1))).unsqueeze(0)
    sizes = [((ends[1] - ends[0]) / spans).std() for ends in (alone, together)]
    assert float(sizes[1]) < 1e-6 < 0.01 < float(sizes[0])


def test_a_value_unlike_all_others_stays_inside_and_decides_nothing_else() -> None:
    values = _values(24)
    usual = _search(values, 0.0)[0]
    values[7, 0, 2] = 40.0
    low, high = _search(values, 0.0)[0]
    assert float(high[2]) >= 40.0
    others = [c for c in range(CLASSES) if c != 2]
    torch.testing.assert_close(torch.stack([low, high])[:, others], usual[:, others])

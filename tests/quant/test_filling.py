"""Stretching scales so that look-ups fill their slots."""

from __future__ import annotations

import math

import pytest
import torch

from fhe_fx.quant.filling import Filling, Reads

EVERY = torch.tensor([True])


def _reads(*room: float, norm: float = 4.0) -> Reads:
    """Return elements of one class whose look-ups err by as much, in encodings of such room."""
    n = len(room)
    like = torch.ones(n, dtype=torch.float64)
    return Reads(torch.zeros(n, dtype=torch.int64), torch.tensor(room).double(), norm * like, like)


def _best(reads: Reads, norm: float, *, held: bool = False, bound: bool = False) -> Filling:
    return Filling.best(
        reads, {7: EVERY}, torch.tensor([held]), torch.tensor([held or bound]), {7: 3}, norm
    )


def test_a_class_that_all_read_alike_is_left_as_it_is() -> None:
    filling = _best(_reads(1.0, 1.0), norm=1e6)
    assert float(filling.stretch) == 1.0
    assert filling.wider == {7: 0}
    assert filling.error == pytest.approx(2.0)


def test_half_an_encoding_left_empty_is_filled_where_noise_has_room() -> None:
    reads = _reads(1.0, 1.9)
    filling = _best(reads, norm=4.0 * 2**2)
    (stretch,) = filling.stretch.tolist()
    assert 1.9 * stretch >= 2  # read twice as large
    assert filling.error < 0.6 * (1 + 1.9**2)
    errors, norms = reads.stretched(stretch, 1)
    assert float(errors) == pytest.approx(filling.error)
    assert float(norms) <= 4.0 * 2**2


def test_noise_beyond_what_is_allowed_leaves_it_empty() -> None:
    filling = _best(_reads(1.0, 1.9), norm=4.0 * 1.5**2)
    assert float(filling.stretch) == 1.0


def test_what_may_not_be_stretched_becomes_a_smaller_part_of_a_wider_encoding() -> None:
    reads = _reads(1.0, 1.9)
    filling = _best(reads, norm=1e6, held=True)
    assert math.log2(float(filling.stretch)) == filling.wider[7] > 0
    assert _best(reads, norm=4.0, held=True).wider == {7: 0}


def test_an_encoding_that_weighs_answers_is_no_wider_than_their_noise_allows() -> None:
    assert _best(_reads(1.0, 1.9), norm=4.0 * 2**2, bound=True).wider[7] <= 1

"""Rounded weights: whole ones stay, sums err less than with each weight rounded by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fhe_fx.quant.weight_rounding import expected_error, round_weights


def _related(seed: int, n_values: int, n_in: int) -> Tensor:
    """Draw channels of which most of the variance lies in a fourth as many directions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return draw(n_values, n_in // 4) @ draw(n_in // 4, n_in) + 0.1 * draw(n_values, n_in)


def _weight(*shape: int) -> Tensor:
    return 8 * torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def _error(weight: Tensor, whole: Tensor, values: Tensor) -> float:
    return float((values @ (weight - whole)).square().mean())


@pytest.mark.parametrize("n_in", [8, 100, 200, 1200])  # in a block of columns, several, in parts
def test_sums_of_values_not_seen_err_less(n_in: int) -> None:
    seen, fresh = _related(0, 4 * n_in + 400, n_in).split([4 * n_in, 400])
    weight = _weight(n_in, 5)
    whole = round_weights(weight, seen)
    assert whole.dtype == torch.int64
    assert _error(weight, whole, fresh) < 0.5 * _error(weight, weight.round(), fresh)


def test_channels_that_have_nothing_to_do_with_each_other_are_rounded_by_themselves() -> None:
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1.0]])
    weight = _weight(4, 3)
    assert torch.equal(round_weights(weight, signs), weight.round().long())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 30))
def test_whole_weights_stay(seed: int, n_in: int, n_values: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n_values, n_in, generator=generator)
    weight = torch.randint(-9, 10, (n_in, 3), generator=generator)
    assert torch.equal(round_weights(weight.double(), values), weight)


def test_matrices_side_by_side_are_rounded_each_for_its_own_values() -> None:
    values = torch.stack([_related(1, 60, 8), _related(2, 60, 8)], 1)
    weight = _weight(2, 8, 3)
    whole = round_weights(weight, values)
    for i in range(2):
        assert torch.equal(whole[i], round_weights(weight[i], values[:, i]))


def test_a_channel_that_never_varies_and_few_values_do_no_harm() -> None:
    values = torch.zeros(1, 6)
    weight = _weight(6, 2)
    assert torch.equal(round_weights(weight, values), weight.round().long())


@pytest.mark.parametrize("n_in", [8, 64])
def test_the_error_is_expected_before_weights_are_rounded(n_in: int) -> None:
    values = _related(3, 20_000, n_in)
    values = values - values.mean(0)
    weight = 20 * _weight(n_in, 200)
    error = values @ (weight - round_weights(weight, values)).double()
    expected = float(expected_error(values))
    assert float(error.square().mean()) == pytest.approx(expected, rel=0.1)

"""Errors of look-ups: what the tables and the look-up operator themselves answer."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from fhe_fx.ir.build import elementwise
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.quant.noise import noise_in_slots
from fhe_fx.quant.tables import build_tables
from fhe_fx.quant.wrapping import LookupError

aten = torch.ops.aten
BITS, LSBS = 6, 8
CERTAIN = 1e-12  # p_error at which noise stays below a tenth of a slot


def _answers(function: object, values: Tensor, low: float, high: float) -> Tensor:
    """Look values up with real tables, in fine integers."""
    one = torch.ones(1, dtype=torch.float64)
    slot = (high - low) / 2**BITS
    tables = build_tables(function, (low + high) / 2 * one, slot * one, 1e-6 * one, BITS)  # type: ignore[arg-type]
    units = ((values - (low + high) / 2) / slot * 2**LSBS).round().long()
    found: Tensor = LOOKUP(units, tables.entries, torch.zeros_like(units), BITS, LSBS)
    return found.double() * 1e-6 + tables.offset[0]


def _errors(model: LookupError, low: float, high: float) -> Tensor:
    """Return the errors `[n_samples, 1]` where all values meet the same ends."""
    which = torch.zeros(len(model.arriving), dtype=torch.int64)
    return model.of(torch.tensor([[low]]).double(), torch.tensor([[high]]).double(), which)[0]


def test_every_value_meets_the_ends_that_are_named_for_it() -> None:
    function = elementwise((aten.exp.default, (), {}))
    values = torch.linspace(-1.2, 1.2, 60, dtype=torch.float64).view(-1, 1)
    index, gradients = torch.zeros(1, dtype=torch.int64), torch.ones(1, *values.shape)
    model = LookupError(function, values, values, index, BITS, CERTAIN, gradients, 60, False)
    which, is_last = torch.arange(60).remainder(2), torch.zeros(60, 1, dtype=torch.bool)
    is_last[40:] = True
    low, high = torch.tensor([[-1.0], [-2.0]]).double(), torch.tensor([[1.0], [2.0]]).double()
    found = model.of(low, high, which, is_last)[0]
    assert torch.equal(found[:40:2], _errors(model, -1.0, 1.0)[:40:2])
    assert torch.equal(found[1::2], _errors(model, -2.0, 2.0)[1::2])
    assert torch.equal(found[40:], _errors(model, -2.0, 2.0)[40:])


@pytest.mark.parametrize("operator", [aten.exp.default, aten.square.default, aten.tanh.default])
def test_it_errs_as_the_tables_do_beyond_both_ends(operator: torch._ops.OpOverload) -> None:
    function = elementwise((operator, (), {}))
    values = torch.linspace(-1.6, 1.6, 2000, dtype=torch.float64).view(-1, 1)
    index = torch.zeros(1, dtype=torch.int64)
    gradients = torch.ones(1, *values.shape)
    model = LookupError(function, values, values, index, BITS, CERTAIN, gradients, 2000, False)
    low, high = -1.0, 1.25
    found = _errors(model, low, high).double()
    expected = _answers(function, values, low, high) - function(values)
    # Noise of less than a tenth of a slot moves only values that close to a slot's end, and a mean
    # over a slot differs from its middle by a part of a slot squared.
    slot = (high - low) / 2**BITS
    differs = (found - expected).abs() > slot**2 * 4
    assert float(differs.double().mean()) < 0.2
    torch.testing.assert_close(
        found.square().mean(), expected.square().mean(), rtol=0.05, atol=1e-5
    )


def test_a_clipped_value_does_not_wrap() -> None:
    function = elementwise((aten.exp.default, (), {}))
    values = torch.linspace(-3.0, 0.0, 50, dtype=torch.float64).view(-1, 1)
    index = torch.zeros(1, dtype=torch.int64)
    gradients = torch.ones(1, *values.shape)
    worst = []
    for is_clipped in (False, True):
        model = LookupError(
            function, values, values, index, BITS, CERTAIN, gradients, 50, is_clipped
        )
        worst.append(float(_errors(model, -1.0, 0.1).abs().max()))
    assert worst[0] > 0.9 > worst[1]


def test_what_wraps_counts_although_its_derivative_is_zero() -> None:
    function = elementwise((aten.exp.default, (), {}))
    values = torch.tensor([[-0.9], [0.5], [1.4]], dtype=torch.float64)  # the last beyond the end
    index = torch.zeros(1, dtype=torch.int64)
    gradients = torch.tensor([0.0, -3.0, 0.0]).view(1, 3, 1)
    model = LookupError(function, values, values, index, BITS, CERTAIN, gradients, 3, False)
    found = _errors(model, -1.0, 1.0).reshape(-1)
    answers = _answers(function, values, -1.0, 1.0).reshape(-1)
    errors = answers - function(values).reshape(-1)
    assert float(found[0]) == 0.0  # a small error, which changes nothing
    assert float(found[1]) == pytest.approx(-3.0 * float(errors[1]), abs=3 * 2 / 2**BITS)
    assert float(found[2]) == pytest.approx(1.0 * float(errors[2]), rel=0.05)  # the mean of three


def test_noise_leaves_half_a_slot_with_the_given_probability() -> None:
    for p_error in (0.1, 0.01):
        deviation = noise_in_slots(p_error)
        inside = NormalDist(0, deviation).cdf(0.5) - NormalDist(0, deviation).cdf(-0.5)
        assert inside == pytest.approx(1 - p_error)

"""The error of products: of which parts it is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fhe_fx.quant.factors import Factor, ProductError

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(400, 3, generator=GENERATOR) for _ in range(2))
ONE = torch.zeros(3, dtype=torch.int64)
NONE = (torch.tensor([-torch.inf]).double(), torch.tensor([torch.inf]).double())


def _factor(exact: Tensor, rounded: Tensor | None = None) -> Factor:
    return Factor(exact, exact if rounded is None else rounded, ONE)


def test_two_bits_more_leave_a_sixteenth() -> None:
    errors = [float(ProductError(_factor(Y), _factor(X), bits).of(*NONE)[0]) for bits in (6, 8)]
    assert errors[0] == pytest.approx(16 * errors[1])


def test_it_is_what_squares_of_rounded_sums_err() -> None:
    bits = 5
    u, v = X.double() / X.double().std(), Y.double() / Y.double().std()

    def square(x: Tensor) -> Tensor:
        slot = (x.max() - x.min()) / 2**bits
        distance: Tensor = (x / slot).round() * slot - x.mean()
        return distance.square() / 2

    def own(x: Tensor) -> Tensor:
        return (x - x.mean()).square() / 2

    read = square(u + v) - square(u) - square(v)
    error = (read - (own(u + v) - own(u) - own(v))) * X.double().std() * Y.double().std()
    model = ProductError(_factor(Y), _factor(X), bits).of(*NONE)[0] / 3
    assert float(model) == pytest.approx(float(error.square().mean()), rel=0.1)


def test_what_a_factor_brought_along_is_multiplied_by_the_other() -> None:
    off = ProductError(_factor(Y), _factor(X, X + 0.5), 20).of(*NONE)[0] / 3
    assert float(off) == pytest.approx(0.25 * float(Y.square().mean()), rel=1e-3)


def test_a_limit_costs_what_it_cuts_off() -> None:
    limits = (torch.tensor([-1.0]).double(), torch.tensor([1.0]).double())
    cut = ProductError(_factor(Y), _factor(X), 20).of(*limits)[0] / 3
    expected = (X * (Y - Y.clamp(-1, 1))).square().mean()
    assert float(cut) == pytest.approx(float(expected), rel=1e-3)

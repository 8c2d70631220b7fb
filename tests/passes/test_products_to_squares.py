"""`products-to-squares`: one look-up a product, the operands' squares shared."""

from __future__ import annotations

import math

import pytest
import torch

from fhe_fx.errors import PassError
from fhe_fx.ir import dialect as d
from fhe_fx.passes import Pipeline
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.passes.expand_matmuls import ExpandMatmuls
from fhe_fx.passes.products_to_squares import ProductsToSquares
from tests.conftest import Build, float_program

X, Y = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(2, -1, 20).view(5, 4)
PASSES = Pipeline((ExpandMatmuls(), Calibrate(), ProductsToSquares()))


def _look_ups(build: Build, *inputs: torch.Tensor) -> int:
    program = float_program(build, inputs)
    program.samples = [tuple(x + 0.1 * k for x in inputs) for k in range(4)]
    expected = program(*inputs)[0]
    PASSES.run(program)
    torch.testing.assert_close(program(*inputs)[0], expected, rtol=1e-4, atol=1e-4)
    assert not program.calls(d.MUL, d.MATMUL)
    return sum(math.prod(d.shape_of(n)) for n in program.maps())


def test_a_product_costs_one_look_up_and_one_for_each_operand_element() -> None:
    assert _look_ups(lambda b, x, y: b.mul(x, y), X, X + 1) == 3 * X.numel()


def test_a_matrix_product_shares_the_squares_of_its_operands() -> None:
    n_products = 3 * 5 * 4
    assert (
        _look_ups(lambda b, x, y: b.matmul(x, b.transpose(y, 0, 1)), X, Y)
        == n_products + X.numel() + Y.numel()
    )


def test_a_broadcast_operand_is_squared_once() -> None:
    assert _look_ups(lambda b, x, y: b.mul(x, y), X, X[:, :1]) == 2 * X.numel() + 3


def test_without_products_nothing_happens() -> None:
    program = float_program(lambda b, x: b.scale(x, 2.0), [X])
    Calibrate().run(program)
    assert ProductsToSquares().run(program) is False


def test_it_needs_calibration() -> None:
    with pytest.raises(PassError) as error:
        Pipeline((ExpandMatmuls(), ProductsToSquares())).check(frozenset({"normal"}))
    assert str(error.value) == (
        "Pass 2, products-to-squares, requires calibrated, which no pass before it gives. "
        "Given by: calibrate."
    )

"""The proof that rows may be padded: per operator, on the graph, for attention of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fhe_fx.passes import Pipeline
from fhe_fx.passes.normalize import Normalize
from fhe_fx.runtime.causality import causal_axes
from tests.programs import program_from


def _axes(function: Callable[..., Any], *shapes: tuple[int, ...], rows: int = 1) -> Any:
    inputs = tuple(torch.rand(shape) for shape in shapes)
    program = program_from(function, [inputs])
    Pipeline((Normalize(),)).run(program)
    return causal_axes(program, [rows] * len(shapes))


def _attention(is_causal: bool) -> Callable[[Tensor], Tensor]:
    def attend(x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, is_causal=is_causal)

    return attend


LOWER = torch.ones(5, 5).tril()


@pytest.mark.parametrize(
    ("function", "axes"),
    [
        (torch.tanh, {0: 1}),
        (lambda x: x * x + 1.0, {0: 1}),
        (lambda x: x.softmax(-1), {0: 1}),
        (lambda x: x - x.mean(-1, keepdim=True), {0: 1}),
        (lambda x: x.transpose(1, 2), {0: 2}),
        (lambda x: (x, x.transpose(1, 2)), {0: 1, 1: 2}),
        (lambda x: LOWER @ x, {0: 1}),
        (_attention(True), {0: 1}),
        (_attention(False), None),
        (lambda x: LOWER.T @ x, None),
        (lambda x: x - x.mean(1, keepdim=True), None),
        (lambda x: x.sum(1), None),
        (lambda x: x.flip(1), None),
        (lambda x: x[:, -1:], None),
        (lambda x: torch.cat([x[:, 1:], x[:, :1]], 1), None),
    ],
)
def test_one_input(function: Callable[[Tensor], Any], axes: dict[int, int] | None) -> None:
    assert _axes(function, (1, 5, 3)) == axes


def test_a_square_input_is_no_riddle() -> None:
    assert _axes(_attention(True), (1, 4, 4)) == {0: 1}
    assert _axes(_attention(False), (1, 4, 4)) is None


def test_rows_may_lie_in_another_axis() -> None:
    assert _axes(lambda x: torch.tanh(x), (1, 3, 5), rows=2) == {0: 2}
    assert _axes(lambda x: x.softmax(-1), (1, 3, 5), rows=2) is None


def test_every_input_must_be_causal() -> None:
    shape = (1, 4, 3)

    def cross(x: Tensor, y: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, y, y, is_causal=True)

    def peek(x: Tensor, y: Tensor) -> Tensor:
        return x + y.flip(1)

    assert _axes(cross, shape, shape) == {0: 1}
    assert _axes(peek, shape, shape) is None


def test_inputs_of_different_lengths_are_not_proved() -> None:
    assert _axes(lambda x, y: x + y, (1, 4, 3), (1, 1, 3)) is None


def test_a_module_with_a_causal_convolution_as_a_product() -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.rand(5, 5).tril(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return (x.transpose(1, 2) @ self.mix.T).transpose(1, 2)

    program = program_from(Mix(), [(torch.rand(1, 5, 3),)])
    Pipeline((Normalize(),)).run(program)
    assert causal_axes(program, [1]) == {0: 1}

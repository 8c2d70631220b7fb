"""An operator that fhe_fx does not know, and how it runs encrypted.

snake(x, a) = x + sin(a x)^2 / a (Ziyin et al. 2020, "Neural Networks Fail to Learn Periodic
Functions and How to Fix It"). It is one function of one tensor, so it is one table. Its derivative
is given because passes weigh errors by derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import fhe_fx
from fhe_fx.ir import Builder


@torch.library.custom_op("flat_softmax::snake", mutates_args=())
def snake(x: Tensor, a: float) -> Tensor:
    """Return x + sin(a x)^2 / a."""
    return x + torch.sin(a * x) ** 2 / a


@snake.register_fake
def _(x: Tensor, a: float) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.a = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return grad * (1 + torch.sin(2 * ctx.a * x)), None


snake.register_autograd(_backward, setup_context=_keep)
SNAKE = torch.ops.flat_softmax.snake.default


@fhe_fx.register_lowering(SNAKE)
def lower_snake(b: Builder, x: fx.Node, a: float) -> fx.Node:
    """Write it as a map."""
    return b.apply(x, SNAKE, a)

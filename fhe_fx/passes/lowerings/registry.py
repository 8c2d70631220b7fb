"""The table of lowerings, and what their rules share.

A rule receives a `Builder` and the operator's own arguments, in which an encrypted tensor is an fx
node of the new graph and a clear one is a tensor. It returns a node, or a tuple of nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder

__all__ = [
    "LOWERINGS",
    "Lowering",
    "Unsupported",
    "Value",
    "aten",
    "fit",
    "is_encrypted",
    "register_lowering",
    "shape_of",
]

Value = Any
"""An encrypted fx node, or a clear tensor or number."""
Lowering = Callable[..., Any]
F = TypeVar("F", bound=Lowering)

LOWERINGS: dict[object, Lowering] = {}
"""The rule of each operator overload."""


aten = torch.ops.aten


class Unsupported(Exception):  # noqa: N818 -- a reason that normalize collects, not an error
    """Why a rule cannot lower a call."""


def register_lowering(*ops: Any) -> Callable[[F], F]:
    """Register the decorated function as the lowering of operators.

    Args:
        ops: operator overloads (`torch.ops.aten.add.Tensor`), or packets for all their overloads.
    """

    def decorate(rule: F) -> F:
        for op in ops:
            if isinstance(op, torch._ops.OpOverloadPacket):
                for name in op.overloads():
                    LOWERINGS[getattr(op, name)] = rule
            else:
                LOWERINGS[op] = rule
        return rule

    return decorate


def is_encrypted(x: object) -> bool:
    """Say whether an argument of a rule is encrypted."""
    return isinstance(x, fx.Node)


def shape_of(x: Value) -> tuple[int, ...]:
    """Return the shape of an encrypted or clear argument."""
    return d.shape_of(x) if isinstance(x, fx.Node) else tuple(torch.as_tensor(x).shape)


def fit(b: Builder, x: fx.Node, constant: Tensor | float) -> fx.Node:
    """Expand x so that `constant` broadcasts to its shape."""
    return b.expand(x, torch.broadcast_shapes(shape_of(x), shape_of(constant)))

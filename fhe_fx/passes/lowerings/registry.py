"""The table of lowerings, and what their rules share.

A rule receives a `Builder` and the operator's own arguments, in which an encrypted tensor is an fx
node of the new graph and a clear one is a tensor. It returns a node, or a tuple of nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._library.custom_ops import CustomOpDef

from fhe_fx import plugins
from fhe_fx.errors import PassError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder

__all__ = [
    "LOWERINGS",
    "TAKES_CLEAR",
    "Lowering",
    "Unsupported",
    "Value",
    "aten",
    "fit",
    "full_name",
    "is_clear",
    "is_encrypted",
    "is_inexact",
    "load_lowerings",
    "register_lowering",
    "shape_of",
]

Value = Any
"""An encrypted fx node, or a clear tensor or number."""
Lowering = Callable[..., Any]
F = TypeVar("F", bound=Lowering)

LOWERINGS: dict[object, Lowering] = plugins.registry({})
"""The rule of each operator overload."""
TAKES_CLEAR: set[object] = plugins.registry(set())
"""Overloads whose rule tells clear arguments that calls bring from encrypted ones; to all others
such an argument is encrypted."""


aten = torch.ops.aten


class Unsupported(Exception):  # noqa: N818 -- a reason that normalize collects, not an error
    """Why a rule cannot lower a call."""


_INEXACT: set[Lowering] = plugins.registry(set())


def register_lowering(
    *ops: Any, replace: bool = False, is_exact: bool = True, takes_clear: bool = False
) -> Callable[[F], F]:
    """Register the decorated function as the lowering of operators.

    A rule that is not part of fhe_fx is compared with its operator on calibration samples.

    Args:
        ops: operator overloads (`torch.ops.aten.add.Tensor`), packets for all their overloads, or
            what `torch.library.custom_op` made.
        replace: take the place of a rule that an operator has already.
        takes_clear: whether the rule asks `is_clear` of its arguments; a clear argument that calls
            bring is encrypted for it otherwise.
        is_exact: whether the rule computes what the operator does, up to float rounding.

    Raises:
        PassError: if an operator has a rule of another name, and `replace` is not given; or what is
            given is no operator, or no function.
    """
    if not ops:
        raise PassError("register_lowering is given no operator. Name it: torch.ops.aten.<name>.")
    overloads = [overload for op in ops for overload in _overloads(op)]

    def decorate(rule: F) -> F:
        if not callable(rule):
            raise PassError(f"{rule!r} is no lowering: it cannot be called.")
        for op in overloads:
            known = LOWERINGS.get(op, rule)
            if not replace and full_name(known) != full_name(rule):
                raise PassError(
                    f"{op} has a lowering: {full_name(known)}. To put {full_name(rule)} in its "
                    f"place, give register_lowering(..., replace=True)."
                )
        LOWERINGS.update(dict.fromkeys(overloads, rule))
        (TAKES_CLEAR.update if takes_clear else TAKES_CLEAR.difference_update)(overloads)
        if not is_exact:
            _INEXACT.add(rule)
        return rule

    return decorate


def _overloads(op: Any) -> list[Any]:
    if isinstance(op, torch._ops.OpOverloadPacket):
        return [getattr(op, name) for name in op.overloads()]
    if isinstance(op, CustomOpDef):
        return [op._opoverload]
    if not isinstance(op, torch._ops.OpOverload):
        raise PassError(
            f"{op!r} is no operator of a captured graph. Give one of torch.ops, as in "
            f"torch.ops.aten.gelu.default; `fhe_fx.trace(model, example).graph` lists a model's."
        )
    return [op]


def full_name(rule: Lowering) -> str:
    """Return module and name of a rule."""
    module = getattr(rule, "__module__", type(rule).__module__)
    return f"{module}.{getattr(rule, '__qualname__', repr(rule))}"


def is_inexact(rule: Lowering) -> bool:
    """Say whether a rule was registered as one that computes something else than its operator."""
    return rule in _INEXACT


def load_lowerings() -> None:
    """Import the modules under the entry point group `fhe_fx.lowerings`.

    A module that fails leaves no rule behind, and is reported.
    """
    plugins.load(plugins.LOWERINGS)


def is_encrypted(x: object) -> bool:
    """Say whether an argument of a rule is encrypted."""
    return isinstance(x, fx.Node) and not x.meta.get("clear")


def is_clear(x: object) -> bool:
    """Say whether an argument of a rule is a clear value that each call brings."""
    return isinstance(x, fx.Node) and bool(x.meta.get("clear"))


def shape_of(x: Value) -> tuple[int, ...]:
    """Return the shape of an encrypted or clear argument."""
    return d.shape_of(x) if isinstance(x, fx.Node) else tuple(torch.as_tensor(x).shape)


def fit(b: Builder, x: fx.Node, constant: Tensor | float) -> fx.Node:
    """Expand x so that `constant` broadcasts to its shape."""
    return b.expand(x, torch.broadcast_shapes(shape_of(x), shape_of(constant)))

"""Lowerings of sums, factors, elementwise functions and reductions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fhe_fx.ir.build import Builder, elementwise
from fhe_fx.passes.lowerings.clear import gate
from fhe_fx.passes.lowerings.registry import (
    LOWERINGS,
    Lowering,
    Unsupported,
    Value,
    aten,
    fit,
    is_clear,
    is_encrypted,
    register_lowering,
    shape_of,
)

# Arithmetic ---------------------------------------------------------------------------------


@register_lowering(aten.add.Tensor, aten.add.Scalar)
def add(b: Builder, x: Value, y: Value, alpha: float = 1) -> fx.Node:
    """Add; a clear operand is a shift."""
    if alpha != 1:
        y = b.scale(y, alpha) if is_encrypted(y) else y * alpha
    if is_encrypted(x) and is_encrypted(y):
        return b.add(x, y)
    if is_encrypted(y):
        x, y = y, x
    return b.shift(fit(b, x, y), y)


@register_lowering(aten.sub.Tensor, aten.sub.Scalar)
def sub(b: Builder, x: Value, y: Value, alpha: float = 1) -> fx.Node:
    """Subtract."""
    if is_encrypted(x) and is_encrypted(y) and alpha == 1:
        return b.sub(x, y)
    return add(b, x, y, alpha=-alpha)


@register_lowering(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(b: Builder, x: Value, y: Value, alpha: float = 1) -> fx.Node:
    """Subtract x from y."""
    return sub(b, y, x, alpha=alpha)


@register_lowering(aten.neg.default)
def neg(b: Builder, x: fx.Node) -> fx.Node:
    """Negate."""
    return b.scale(x, -1.0)


@register_lowering(aten.mul.Tensor, aten.mul.Scalar, takes_clear=True)
def mul(b: Builder, x: Value, y: Value) -> fx.Node:
    """Multiply; a clear operand is a scale, the same tensor twice a square."""
    if x is y:
        return b.apply(x, aten.pow.Tensor_Scalar, 2)
    if is_encrypted(x) and is_encrypted(y):
        return b.mul(x, y)
    if is_encrypted(y):
        x, y = y, x
    if is_clear(y):
        return gate(b, x, y)
    return b.scale(fit(b, x, y), y)


@register_lowering(aten.div.Tensor, aten.div.Scalar, takes_clear=True)
def div(b: Builder, x: Value, y: Value) -> fx.Node:
    """Divide; by an encrypted tensor, multiply by its reciprocal."""
    if is_clear(y):
        return mul(b, x, b.computed(aten.reciprocal.default, y))
    if not is_encrypted(y):
        return mul(b, x, 1.0 / torch.as_tensor(y, dtype=torch.float32))
    return mul(b, x, b.apply(y, aten.reciprocal.default))


@register_lowering(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_rounded(b: Builder, x: Value, y: Value, *, rounding_mode: str | None = None) -> fx.Node:
    """Divide, then round down or towards zero."""
    quotient = div(b, x, y)
    if rounding_mode is None:
        return quotient
    op = aten.floor.default if rounding_mode == "floor" else aten.trunc.default
    return b.apply(quotient, op)


@register_lowering(aten.pow.Tensor_Scalar)
def pow_(b: Builder, x: fx.Node, exponent: float) -> fx.Node:
    """Raise to a constant power."""
    return x if exponent == 1 else b.apply(x, aten.pow.Tensor_Scalar, exponent)


@register_lowering(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def pow_tensor(b: Builder, x: Value, y: Value) -> fx.Node:
    """Raise a constant number to an encrypted power, or the reverse."""
    if is_encrypted(x) and is_encrypted(y):
        raise Unsupported("base and exponent are both encrypted")
    if is_encrypted(x):
        return b.apply(fit(b, x, y), aten.pow.Tensor_Tensor, y)
    base = torch.as_tensor(x, dtype=torch.float32)
    if bool((base <= 0).any()):
        raise Unsupported("the base of an encrypted power is not positive")
    return b.apply(mul(b, y, base.log()), aten.exp.default)


@register_lowering(aten.where.self, takes_clear=True)
def where(b: Builder, condition: Value, x: Value, y: Value) -> fx.Node:
    """Choose by a mask: one operand times the mask, plus the other times its inverse."""
    if is_clear(condition):
        return add(b, _where_clear(b, condition, x), _where_clear(b, condition, y, is_not=True))
    x, y = (b.promoted(v) if is_clear(v) else v for v in (x, y))
    if is_encrypted(condition):  # zeros and ones; fused to one table if all depends on one tensor
        return add(b, mul(b, x, condition), mul(b, y, rsub(b, condition, 1.0)))
    mask = condition.to(torch.float32)
    if is_encrypted(x) and is_encrypted(y):
        return add(b, mul(b, x, mask), mul(b, y, 1 - mask))
    if is_encrypted(y):
        x, y, condition, mask = y, x, ~condition, 1 - mask
    fill = torch.where(condition, torch.zeros(()), torch.as_tensor(y, dtype=torch.float32))
    return add(b, mul(b, x, mask), fill)


def _where_clear(b: Builder, mask: fx.Node, x: Value, *, is_not: bool = False) -> fx.Node:
    """Return x where a clear mask that calls bring holds, and zero elsewhere."""
    if is_not:
        mask = b.computed(aten.logical_not.default, mask)
    if is_encrypted(x):
        return gate(b, x, mask)
    value = x if is_clear(x) else torch.as_tensor(x, dtype=torch.float32)
    return b.promoted(b.computed(aten.where.self, mask, value, torch.zeros(())))


COMPARISONS = (
    aten.gt.Scalar,
    aten.ge.Scalar,
    aten.lt.Scalar,
    aten.le.Scalar,
    aten.eq.Scalar,
    aten.ne.Scalar,
)
"""Steps at a constant number: zeros and ones."""


def _comparison(op: Any) -> Lowering:
    def rule(b: Builder, x: fx.Node, number: float) -> fx.Node:
        step = elementwise((op, (number,), {}), (aten.to.dtype, (torch.float32,), {}))
        return b.map(x, step, "step")

    return rule


def _tensor_comparison(op: Any) -> Lowering:
    def rule(b: Builder, x: Value, y: Value) -> fx.Node:
        return _comparison(op)(b, sub(b, x, y), 0.0)  # type: ignore[no-any-return]

    return rule


for _op in COMPARISONS:
    LOWERINGS[_op] = _comparison(_op)
    LOWERINGS[_op.overloadpacket.Tensor] = _tensor_comparison(_op)


@register_lowering(aten.masked_fill.Scalar, aten.masked_fill.Tensor, takes_clear=True)
def masked_fill(b: Builder, x: fx.Node, mask: Value, value: Value) -> fx.Node:
    """Overwrite where a constant mask is true."""
    if is_encrypted(mask) or is_clear(mask):
        return where(b, mask, value, x)
    return where(b, ~mask, x, value)


# Elementwise functions ----------------------------------------------------------------------

UNARY = (
    aten.exp.default,
    aten.exp2.default,
    aten.expm1.default,
    aten.log.default,
    aten.log1p.default,
    aten.log2.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.erf.default,
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.abs.default,
    aten.sin.default,
    aten.cos.default,
    aten.softplus.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.mish.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.square.default,
    aten.log_sigmoid.default,
    aten.atan.default,
    aten.selu.default,
    aten.celu.default,
    aten.sign.default,
    aten.floor.default,
    aten.ceil.default,
    aten.round.default,
    aten.trunc.default,
    aten.tan.default,
    aten.asin.default,
    aten.acos.default,
    aten.sinh.default,
    aten.cosh.default,
    aten.asinh.default,
    aten.acosh.default,
    aten.atanh.default,
    aten.log10.default,
    aten.erfc.default,
    aten.remainder.Scalar,
    aten.hardshrink.default,
)
"""Functions of one tensor whose other arguments are numbers: one table each."""


def _unary(op: Any) -> Lowering:
    def rule(b: Builder, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        return b.apply(x, op, *args, **kwargs)

    return rule


for _op in UNARY:
    LOWERINGS[_op] = _unary(_op)


# Maxima -------------------------------------------------------------------------------------


@register_lowering(aten.maximum.default)
def maximum(b: Builder, x: Value, y: Value) -> fx.Node:
    """Add what y exceeds x by, if it does: one look-up an element."""
    if not is_encrypted(x):
        x, y = y, x
    return add(b, b.apply(sub(b, y, x), aten.relu.default), x)


@register_lowering(aten.minimum.default)
def minimum(b: Builder, x: Value, y: Value) -> fx.Node:
    """Subtract what x exceeds y by, if it does: one look-up an element."""
    if not is_encrypted(x):
        x, y = y, x
    return sub(b, x, b.apply(sub(b, x, y), aten.relu.default))


@register_lowering(aten.clamp.Tensor)
def clamp_between(
    b: Builder, x: Value, low: Value | None = None, high: Value | None = None
) -> fx.Node:
    """Keep each element between two constant numbers of its own."""
    if not is_encrypted(x) or is_encrypted(low) or is_encrypted(high):
        raise Unsupported("its bounds are encrypted; torch.maximum and torch.minimum take such")
    for bound in (low, high):
        x = x if bound is None else fit(b, x, bound)
    return b.apply(x, aten.clamp.Tensor, low, high)


@register_lowering(aten.amax.default)
def greatest(b: Builder, x: fx.Node, dims: Sequence[int] = (), keepdim: bool = False) -> fx.Node:
    """Keep the greater of each pair until one is left: n - 1 look-ups for n elements."""
    return _tournament(b, x, dims, keepdim, maximum)


@register_lowering(aten.amin.default)
def least(b: Builder, x: fx.Node, dims: Sequence[int] = (), keepdim: bool = False) -> fx.Node:
    """Keep the smaller of each pair until one is left: n - 1 look-ups for n elements."""
    return _tournament(b, x, dims, keepdim, minimum)


def _tournament(
    b: Builder, x: fx.Node, dims: Sequence[int], keepdim: bool, better: Lowering
) -> fx.Node:
    rank = len(shape_of(x))
    over = sorted({dim % rank for dim in dims or range(rank)})
    for dim in over:
        while (n := shape_of(x)[dim]) > 1:
            first = b.index_select(x, dim, torch.arange(n // 2))
            second = b.index_select(x, dim, torch.arange(n // 2, n // 2 * 2))
            rest = [b.index_select(x, dim, torch.tensor([n - 1]))] if n % 2 else []
            x = b.cat([better(b, first, second), *rest], dim)
    shape = shape_of(x)
    return x if keepdim else b.view(x, [n for i, n in enumerate(shape) if i not in over])


@register_lowering(aten.max.dim)
def max_dim(b: Builder, x: fx.Node, dim: int, keepdim: bool = False) -> tuple[fx.Node]:
    """Keep the greatest; where it stood is not known."""
    return (greatest(b, x, [dim], keepdim),)


@register_lowering(aten.min.dim)
def min_dim(b: Builder, x: fx.Node, dim: int, keepdim: bool = False) -> tuple[fx.Node]:
    """Keep the least; where it stood is not known."""
    return (least(b, x, [dim], keepdim),)


@register_lowering(aten.max.default)
def max_all(b: Builder, x: fx.Node) -> fx.Node:
    """Keep the greatest."""
    return greatest(b, x)


@register_lowering(aten.min.default)
def min_all(b: Builder, x: fx.Node) -> fx.Node:
    """Keep the least."""
    return least(b, x)


# Reductions ---------------------------------------------------------------------------------


@register_lowering(aten.sum.dim_IntList, aten.sum.default)
def sum_(
    b: Builder, x: fx.Node, dims: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> fx.Node:
    """Sum."""
    return b.sum(x, list(dims) if dims else range(len(shape_of(x))), keepdim)


@register_lowering(aten.mean.dim, aten.mean.default)
def mean(
    b: Builder, x: fx.Node, dims: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> fx.Node:
    """Average."""
    total = sum_(b, x, dims, keepdim)
    return b.scale(total, math.prod(shape_of(total)) / math.prod(shape_of(x)))


@register_lowering(aten.cumsum.default)
def cumsum(b: Builder, x: fx.Node, dim: int, **_: Any) -> fx.Node:
    """Multiply by a triangle of ones."""
    last = len(shape_of(x)) - 1
    turned = b.transpose(x, dim % (last + 1), last)
    n, flat = shape_of(turned)[-1], b.view(turned, (-1, shape_of(turned)[-1]))
    summed = b.view(b.linear(flat, torch.ones(n, n).triu()), shape_of(turned))
    return b.transpose(summed, dim % (last + 1), last)


@register_lowering(aten.prod.dim_int, aten.prod.default)
def prod(b: Builder, x: fx.Node, dim: int | None = None, keepdim: bool = False) -> fx.Node:
    """Multiply pairs until one is left."""
    return _tournament(b, x, () if dim is None else [dim], keepdim, mul)


@register_lowering(aten.linalg_vector_norm.default)
def vector_norm(
    b: Builder,
    x: fx.Node,
    order: float = 2,
    dims: Sequence[int] | None = None,
    keepdim: bool = False,
    **_: Any,
) -> fx.Node:
    """Add the powers of the sizes, and take the root of the sum."""
    if order in {math.inf, 0, -math.inf}:
        raise Unsupported(f"a norm of order {order} is no sum of powers")
    if order == 1:
        return sum_(b, b.apply(x, aten.abs.default), dims, keepdim)
    powers = x if order == 2 else b.apply(x, aten.abs.default)
    total = sum_(b, b.apply(powers, aten.pow.Tensor_Scalar, order), dims, keepdim)
    return b.apply(total, aten.pow.Tensor_Scalar, 1 / order)


@register_lowering(aten.var.correction)
def var(
    b: Builder,
    x: fx.Node,
    dims: Sequence[int] | None = None,
    *,
    correction: float | None = 1,
    keepdim: bool = False,
) -> fx.Node:
    """Average the squares of the deviations."""
    correction = 1 if correction is None else correction
    centred = b.sub(x, mean(b, x, dims, True))
    total = sum_(b, b.apply(centred, aten.pow.Tensor_Scalar, 2), dims, keepdim)
    n = math.prod(shape_of(x)) // math.prod(shape_of(total))
    if n <= correction:
        raise Unsupported(f"a variance of {n} values with correction {correction} is undefined")
    return b.scale(total, 1.0 / (n - correction))


@register_lowering(aten.var.dim)
def var_dim(
    b: Builder, x: fx.Node, dims: Sequence[int], unbiased: bool = True, keepdim: bool = False
) -> fx.Node:
    """Average the squares of the deviations."""
    return var(b, x, dims, correction=float(unbiased), keepdim=keepdim)


@register_lowering(aten.native_layer_norm.default)
def native_layer_norm(
    b: Builder, x: fx.Node, shape: Sequence[int], weight: Value, bias: Value, eps: float
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Centre, divide by the standard deviation, scale and shift by clear vectors."""
    dims = list(range(-len(shape), 0))
    average = mean(b, x, dims, True)
    centred = b.sub(x, average)
    variance = mean(b, b.apply(centred, aten.pow.Tensor_Scalar, 2), dims, True)
    inverse = b.apply(b.shift(variance, eps), aten.rsqrt.default)
    y = b.mul(centred, inverse)
    y = y if weight is None else mul(b, y, weight)
    return (y if bias is None else add(b, y, bias)), average, inverse


@register_lowering(aten.native_group_norm.default)
def native_group_norm(
    b: Builder,
    x: fx.Node,
    weight: Value,
    bias: Value,
    n: int,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Layer norm of each group of channels, then a scale and a shift for each channel."""
    shape = shape_of(x)
    flat = b.view(x, (n, groups, channels // groups * size))
    y, average, inverse = native_layer_norm(b, flat, [channels // groups * size], None, None, eps)
    y = b.view(y, shape)
    each = (channels,) + (1,) * (len(shape) - 2)
    y = y if weight is None else mul(b, y, weight.view(each))
    y = y if bias is None else add(b, y, bias.view(each))
    return y, b.view(average, (n, groups)), b.view(inverse, (n, groups))

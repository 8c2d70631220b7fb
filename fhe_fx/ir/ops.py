"""The operators of the dialect that PyTorch does not have, registered with `torch.library`.

The dialect has two stages with the same affine and structural operators:

* *float*: elementwise functions are `call_module` nodes (one function of one tensor), products of
  two encrypted tensors are `aten.mul` and `aten.matmul`, and `masked_softmax` is one operator;
* *integer*: affine operators have integer constants, and the only others are `lookup`, and
  `round`, behind which results leave.

Every operator has a meaning in eager PyTorch, so a program of either stage simply runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fhe_fx.ir.types import as_decrypted

__all__ = [
    "ENTER",
    "GATE",
    "LEAVE",
    "LINEAR",
    "LOOKUP",
    "MASKED_SOFTMAX",
    "PUT_PAIRS",
    "ROUND",
    "SCALE",
    "SHIFT",
    "TABULATED",
    "TAKE_PAIRS",
]

_EXACT_IN_DOUBLE = float(1 << 53)


@torch.library.custom_op("fhe_fx::enter", mutates_args=())
def _enter(x: Tensor, path: str, leaf: int) -> Tensor:
    """Mark tensor number `leaf` of the arguments of module `path`; the identity."""
    return x.clone()


@_enter.register_fake
def _(x: Tensor, path: str, leaf: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fhe_fx::leave", mutates_args=())
def _leave(x: Tensor, path: str, leaf: int) -> Tensor:
    """Mark tensor number `leaf` of the results of module `path`; the identity."""
    return x.clone()


@_leave.register_fake
def _(x: Tensor, path: str, leaf: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fhe_fx::scale", mutates_args=())
def _scale(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a clear tensor that broadcasts to the shape of x. Affine: no look-up."""
    return x * factor


@_scale.register_fake
def _(x: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fhe_fx::tabulated", mutates_args=())
def _tabulated(x: Tensor) -> Tensor:
    """Inside a map: the one value that a table holds for all inputs of a slot; in float, x itself.

    A table holds the mean of its function over a slot. Where g(f(x)) must agree with f(x) as
    another table of the same x holds it, the function is g(tabulated(f(x))): the mean inside.
    """
    return x.clone()


@_tabulated.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fhe_fx::shift", mutates_args=())
def _shift(x: Tensor, offset: Tensor) -> Tensor:
    """Add a clear tensor that broadcasts to the shape of x. Affine: no look-up."""
    return x + offset


@_shift.register_fake
def _(x: Tensor, offset: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fhe_fx::gate", mutates_args=())
def _gate(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by clear integers that each run brings, of the shape of x. Affine: no look-up."""
    return x * factor


@_gate.register_fake
def _(x: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fhe_fx::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Matrix product with a clear matrix on the right, exact on integers. Affine: no look-up."""
    if x.dtype.is_floating_point:
        return _product(x, weight.to(x.dtype))
    bound = x.abs().max().double() * weight.abs().max().double() * weight.shape[-2]
    if float(bound) < _EXACT_IN_DOUBLE:  # BLAS has no integers; doubles are exact here
        return _product(x.double(), weight.double()).round().long()
    return torch.matmul(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply; what is stacked in front of a stack of matrices is taken together, as rows.

    `matmul` would copy the matrices for each: those of a rotary embedding, one for each position,
    for each of many samples.
    """
    extra = x.dim() - weight.dim()
    if extra <= 0 or weight.dim() == 2:
        return torch.matmul(x, weight)
    stacked = x.flatten(0, extra - 1).movedim(0, -3)
    found = torch.matmul(stacked.flatten(-3, -2), weight)
    found = found.view(*found.shape[:-2], *stacked.shape[-3:-1], found.shape[-1]).movedim(-3, 0)
    return found.reshape(*x.shape[:extra], *found.shape[1:]).contiguous()


@_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(
        (*torch.broadcast_shapes(x.shape[:-2], weight.shape[:-2]), x.shape[-2], weight.shape[-1])
    )


@torch.library.custom_op("fhe_fx::take_pairs", mutates_args=())
def _take_pairs(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Gather `x[..., rows[p], columns[p]]` for every pair p. Structural: no look-up."""
    return x[..., rows, columns]


@_take_pairs.register_fake
def _(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-2], rows.shape[0]))


@torch.library.custom_op("fhe_fx::put_pairs", mutates_args=())
def _put_pairs(x: Tensor, rows: Tensor, columns: Tensor, n_rows: int, n_columns: int) -> Tensor:
    """Put `x[..., p]` at row `rows[p]`, column `columns[p]` of a matrix of zeros. Structural."""
    out = x.new_zeros((*x.shape[:-1], n_rows, n_columns))
    out[..., rows, columns] = x
    return out


@_put_pairs.register_fake
def _(x: Tensor, rows: Tensor, columns: Tensor, n_rows: int, n_columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n_rows, n_columns))


@torch.library.custom_op("fhe_fx::masked_softmax", mutates_args=())
def _masked_softmax(x: Tensor, live: Tensor, is_log: bool) -> Tensor:
    """Softmax over the last dimension, or its logarithm, among the entries where `live` is true.

    Entries that are not live are zero, and so is a row without live entries.
    """
    live = live.expand(x.shape)
    function = torch.log_softmax if is_log else torch.softmax
    result = function(x.masked_fill(~live, -torch.inf), -1)
    return torch.where(live, result, torch.zeros_like(result))


@_masked_softmax.register_fake
def _(x: Tensor, live: Tensor, is_log: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fhe_fx::lookup", mutates_args=())
def _lookup(x: Tensor, tables: Tensor, which: Tensor, bits: int, lsbs: int) -> Tensor:
    """Programmable bootstrap: round away `lsbs` low bits of x, then read a table of `2**bits`.

    Args:
        x: accumulators, signed, int64, of any shape.
        tables: distinct tables, `[n_tables, 2**bits]`, int64; entry i answers the rounded
            value `i - 2**(bits-1)`.
        which: the row of `tables` that each element reads; broadcasts to the shape of x.
        bits: input bits of the look-up, after rounding.
        lsbs: low bits removed by the rounding.

    A value outside `[-2**(bits-1), 2**(bits-1))` wraps as it does under encryption, where the
    table continues anti-periodically: one period on, it answers minus the entry (TFHE's blind
    rotation is modulo X^N + 1; Chillotti et al. 2020, section 4).
    """
    n = tables.shape[-1]
    rounded = (x + (1 << (lsbs - 1)) >> lsbs) if lsbs else x
    index = torch.remainder(rounded + n // 2, 2 * n)
    sign = torch.where(index < n, 1, -1)
    return sign * tables[which.expand(x.shape), torch.remainder(index, n)]


@_lookup.register_fake
def _(x: Tensor, tables: Tensor, which: Tensor, bits: int, lsbs: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fhe_fx::round", mutates_args=())
def _round(x: Tensor, bits: int, lsbs: int) -> Tensor:
    """Round away `lsbs` low bits of a result: a ciphertext is decrypted without them.

    What is left has `bits` bits, and a result beyond them is right for as far again on both sides
    together: the client reads the bit above, too, which a look-up needs for its own. Beyond that
    it wraps.

    Args:
        x: accumulators of `bits + lsbs` bits, signed, int64, of any shape.
        bits: of what is decrypted.
        lsbs: low bits removed.
    """
    rounded = (x + (1 << (lsbs - 1)) >> lsbs) if lsbs else x
    return as_decrypted(rounded, bits)


@_round.register_fake
def _(x: Tensor, bits: int, lsbs: int) -> Tensor:
    return torch.empty_like(x)


ENTER = torch.ops.fhe_fx.enter.default
LEAVE = torch.ops.fhe_fx.leave.default
SCALE = torch.ops.fhe_fx.scale.default
SHIFT = torch.ops.fhe_fx.shift.default
TABULATED = torch.ops.fhe_fx.tabulated.default
GATE = torch.ops.fhe_fx.gate.default
LINEAR = torch.ops.fhe_fx.linear.default
TAKE_PAIRS = torch.ops.fhe_fx.take_pairs.default
PUT_PAIRS = torch.ops.fhe_fx.put_pairs.default
MASKED_SOFTMAX = torch.ops.fhe_fx.masked_softmax.default
LOOKUP = torch.ops.fhe_fx.lookup.default
ROUND = torch.ops.fhe_fx.round.default


# Gradients ----------------------------------------------------------------------------------
# Float programs are differentiable in their encrypted tensors: passes weigh errors by them.


def _keep_constants(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape, ctx.constants = inputs[0].shape, inputs[1:]


def _keep_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.live, ctx.is_log, ctx.found = inputs[1], inputs[2], output


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    grad = torch.where(ctx.live, grad, 0.0)
    if ctx.is_log:
        p = torch.where(ctx.live, ctx.found.exp(), 0.0)
        return grad - p * grad.sum(-1, keepdim=True), None, None
    p = ctx.found
    return p * (grad - (p * grad).sum(-1, keepdim=True)), None, None


def _scale_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad * ctx.constants[0], None


def _shift_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


def _tabulated_backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _product(grad, ctx.constants[0].to(grad.dtype).mT).sum_to_size(ctx.shape), None


def _take_pairs_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    rows, columns = ctx.constants
    flat = grad.new_zeros((*ctx.shape[:-2], ctx.shape[-2] * ctx.shape[-1]))
    return flat.index_add(-1, rows * ctx.shape[-1] + columns, grad).view(ctx.shape), None, None


def _put_pairs_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    rows, columns, *_ = ctx.constants
    return grad[..., rows, columns], None, None, None, None


_tabulated.register_autograd(_tabulated_backward)
_masked_softmax.register_autograd(_softmax_backward, setup_context=_keep_softmax)
for _operator, _backward in (
    (_scale, _scale_backward),
    (_shift, _shift_backward),
    (_gate, _scale_backward),
    (_linear, _linear_backward),
    (_take_pairs, _take_pairs_backward),
    (_put_pairs, _put_pairs_backward),
):
    _operator.register_autograd(_backward, setup_context=_keep_constants)

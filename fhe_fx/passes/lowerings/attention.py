"""Lowerings of matrix products, softmax and attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import SCALE, SHIFT
from fhe_fx.passes.lowerings.arithmetic import add
from fhe_fx.passes.lowerings.clear import clear_matmul, gated_softmax
from fhe_fx.passes.lowerings.registry import (
    Unsupported,
    Value,
    aten,
    is_clear,
    is_encrypted,
    register_lowering,
    shape_of,
)

MASKED_BELOW = -1e4
"""An additive constant below this hides an entry from a softmax: its weight is under 1e-4000."""


# Matrix products ----------------------------------------------------------------------------


@register_lowering(aten.matmul.default, aten.mm.default, aten.bmm.default, takes_clear=True)
def matmul(b: Builder, x: Value, y: Value) -> fx.Node:
    """Matrix product; affine if an operand is clear."""
    if is_clear(x) or is_clear(y):
        return _clear_matmul(b, x, y)
    if len(shape_of(x)) == 1:
        lifted = b.view(x, (1, -1)) if isinstance(x, fx.Node) else x.unsqueeze(0)
        product = matmul(b, lifted, y)
        shape = shape_of(product)
        return b.view(product, shape[:-1] if len(shape_of(y)) == 1 else (*shape[:-2], shape[-1]))
    if len(shape_of(y)) == 1:
        lifted = b.view(y, (-1, 1)) if isinstance(y, fx.Node) else y.unsqueeze(1)
        product = matmul(b, x, lifted)
        return b.view(product, shape_of(product)[:-1])
    if is_encrypted(x) and is_encrypted(y):
        batch = torch.broadcast_shapes(shape_of(x)[:-2], shape_of(y)[:-2])
        return b.matmul(
            b.expand(x, batch + shape_of(x)[-2:]), b.expand(y, batch + shape_of(y)[-2:])
        )
    if is_encrypted(x):
        return b.linear(x, y)
    product = b.linear(b.transpose(y, -2, -1), x.transpose(-2, -1))
    return b.transpose(product, -2, -1)


def _clear_matmul(b: Builder, x: Value, y: Value) -> fx.Node:
    """Multiply matrices of which one is clear and of each call."""
    if min(len(shape_of(x)), len(shape_of(y))) < 2:
        return matmul(b, *(b.promoted(v) if is_clear(v) else v for v in (x, y)))
    if is_clear(y):
        return clear_matmul(b, x, y)
    turned = clear_matmul(b, b.transpose(y, -2, -1), b.computed(aten.transpose.int, x, -2, -1))
    return b.transpose(turned, -2, -1)


@register_lowering(aten.addmm.default, aten.baddbmm.default)
def addmm(
    b: Builder, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1
) -> fx.Node:
    """Matrix product plus bias."""
    product = matmul(b, x, y)
    product = product if alpha == 1 else b.scale(product, alpha)
    return add(b, product, bias, alpha=beta)


@register_lowering(aten.linear.default)
def linear(b: Builder, x: Value, weight: Value, bias: Value = None) -> fx.Node:
    """Multiply by a transposed weight and add a bias."""
    turned = (
        b.transpose(weight, -2, -1) if isinstance(weight, fx.Node) else weight.transpose(-2, -1)
    )
    product = matmul(b, x, turned)
    return product if bias is None else add(b, product, bias)


# Softmax and attention ----------------------------------------------------------------------


def _split_mask(b: Builder, x: fx.Node) -> tuple[fx.Node, Tensor]:
    """Separate scores from the additive constants that hide some of them."""
    live = torch.ones(shape_of(x), dtype=torch.bool)
    while d.is_call(x, SHIFT):
        offset = d.constant(d.input_node(x, 1)).expand(shape_of(x))
        hidden = offset < MASKED_BELOW
        if not bool(hidden.any()):
            break
        live &= ~hidden
        x = d.input_node(x)
        kept = torch.where(hidden, torch.zeros(()), offset)
        if bool((kept != 0).any()):
            return b.shift(x, kept), live
        if d.is_call(x, SCALE):  # a mask by where(): the factor is one on what it keeps
            factor = d.constant(d.input_node(x, 1)).expand(shape_of(x))
            if bool((factor[live] == 1).all()):
                x = d.input_node(x)
    return x, live


def _split_clear_mask(b: Builder, x: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Separate scores from a clear addend of each call, which may hide some of them."""
    if not d.is_call(x, d.ADD):
        return x, None
    added = next((n for n in d.operands(x) if _is_outside(n)), None)
    if added is None:
        return x, None
    scores = d.input_node(x, 1 if x.args[0] is added else 0)
    # What stands between is broadcasting by the sum: all else is computed before.
    mask = b.computed(aten.expand.default, d.before_moves(added), list(shape_of(x)))
    shown = b.computed(aten.ge.Scalar, mask, MASKED_BELOW)
    kept = b.computed(aten.where.self, shown, mask, torch.zeros(()))
    return b.add(scores, b.promoted(kept)), shown


def _is_outside(n: fx.Node) -> bool:
    """Say whether a value is of the client, moved."""
    return bool(d.before_moves(n).meta.get("is_outside"))


def _softmax(b: Builder, x: fx.Node, dim: int, is_log: bool) -> fx.Node:
    rank = len(shape_of(x))
    if dim % rank != rank - 1:
        turned = _softmax(b, b.transpose(x, dim % rank, rank - 1), rank - 1, is_log)
        return b.transpose(turned, dim % rank, rank - 1)
    scores, live = _split_mask(b, x)
    scores, of_call = _split_clear_mask(b, scores)
    if of_call is not None:
        mask = b.computed(aten.logical_and.default, of_call, live)
        return gated_softmax(b, scores, mask, is_log=is_log)
    if not bool(live.any()):
        raise Unsupported("its mask hides every entry")
    return b.masked_softmax(scores, live, is_log)


@register_lowering(aten._softmax.default, aten.softmax.int, aten._safe_softmax.default)
def softmax(b: Builder, x: fx.Node, dim: int, *_: Any, **__: Any) -> fx.Node:
    """Softmax among the entries that no constant mask hides."""
    return _softmax(b, x, dim, is_log=False)


@register_lowering(aten._log_softmax.default, aten.log_softmax.int)
def log_softmax(b: Builder, x: fx.Node, dim: int, *_: Any, **__: Any) -> fx.Node:
    """Logarithm of the softmax."""
    return _softmax(b, x, dim, is_log=True)


@register_lowering(aten.scaled_dot_product_attention.default, takes_clear=True)
def scaled_dot_product_attention(
    b: Builder,
    q: Value,
    k: Value,
    v: Value,
    attn_mask: Value = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> fx.Node:
    """Write attention out: scores, mask, softmax, weighted sum."""
    if dropout_p:
        raise Unsupported("dropout is active; call model.eval()")
    if enable_gqa:
        repeats = shape_of(q)[-3] // shape_of(k)[-3]
        heads = torch.arange(shape_of(k)[-3]).repeat_interleave(repeats)

        def group(x: Value) -> Value:
            return b.index_select(x, -3, heads) if is_encrypted(x) else x.index_select(-3, heads)

        k, v = group(k), group(v)
    factor = 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else scale
    turned = b.transpose(k, -2, -1) if isinstance(k, fx.Node) else k.transpose(-2, -1)
    scores = b.scale(matmul(b, q, turned), factor)
    if is_causal:
        attn_mask = torch.ones(shape_of(scores)[-2:], dtype=torch.bool).tril()
    if is_clear(attn_mask):
        v = b.promoted(v) if is_clear(v) else v
        if attn_mask.meta["val"].dtype == torch.bool:
            return matmul(b, gated_softmax(b, scores, attn_mask, is_log=False), v)
        attn_mask = b.promoted(attn_mask)
    if attn_mask is not None:
        if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
        scores = add(b, scores, attn_mask)
    return matmul(b, _softmax(b, scores, -1, is_log=False), v)

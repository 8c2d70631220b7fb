"""How each ATen operator is written in the float dialect: one small rule an operator.

A rule receives a `Builder` and the operator's own arguments, in which an encrypted tensor is an fx
node of the new graph and a clear one is a tensor. It returns a node, or a tuple of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder, elementwise
from fhe_fx.ir.ops import ENTER, LEAVE, SCALE, SHIFT

__all__ = ["LOWERINGS", "Unsupported", "register_lowering"]

Value = Any
"""An encrypted fx node, or a clear tensor or number."""
Lowering = Callable[..., Any]
F = TypeVar("F", bound=Lowering)

LOWERINGS: dict[object, Lowering] = {}
"""The rule of each operator overload."""

MASKED_BELOW = -1e4
"""An additive constant below this hides an entry from a softmax: its weight is under 1e-4000."""

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


def _encrypted(x: object) -> bool:
    return isinstance(x, fx.Node)


def _shape(x: Value) -> tuple[int, ...]:
    return d.shape_of(x) if isinstance(x, fx.Node) else tuple(torch.as_tensor(x).shape)


def _fit(b: Builder, x: fx.Node, constant: Tensor | float) -> fx.Node:
    """Expand x so that `constant` broadcasts to its shape."""
    return b.expand(x, torch.broadcast_shapes(_shape(x), _shape(constant)))


# The identity -------------------------------------------------------------------------------


@register_lowering(
    ENTER, LEAVE, aten.clone, aten.alias, aten.detach, aten._to_copy, aten.lift_fresh_copy,
    aten.contiguous, aten.to,
)
def identity(b: Builder, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    """Return x."""
    return x


# Structure ----------------------------------------------------------------------------------


@register_lowering(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(b: Builder, x: fx.Node, shape: Sequence[int]) -> fx.Node:
    """Reshape."""
    return b.view(x, shape)


@register_lowering(aten.unsqueeze.default)
def unsqueeze(b: Builder, x: fx.Node, dim: int) -> fx.Node:
    """Insert a dimension of size one."""
    shape = list(_shape(x))
    shape.insert(dim % (len(shape) + 1), 1)
    return b.view(x, shape)


@register_lowering(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(b: Builder, x: fx.Node, dims: int | Sequence[int] | None = None) -> fx.Node:
    """Drop dimensions of size one."""
    rank = len(_shape(x))
    wanted = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    drop = {dim % rank for dim in wanted}
    return b.view(x, [n for i, n in enumerate(_shape(x)) if not (i in drop and n == 1)])


@register_lowering(aten.permute.default)
def permute(b: Builder, x: fx.Node, dims: Sequence[int]) -> fx.Node:
    """Permute dimensions."""
    return b.permute(x, dims)


@register_lowering(aten.transpose.int)
def transpose(b: Builder, x: fx.Node, first: int, second: int) -> fx.Node:
    """Swap two dimensions."""
    return b.transpose(x, first, second)


@register_lowering(aten.t.default)
def t(b: Builder, x: fx.Node) -> fx.Node:
    """Transpose a matrix."""
    return b.transpose(x, 0, 1) if len(_shape(x)) == 2 else x


@register_lowering(aten.expand.default)
def expand(b: Builder, x: fx.Node, shape: Sequence[int], **_: Any) -> fx.Node:
    """Broadcast."""
    return b.expand(x, shape)


@register_lowering(aten.repeat.default)
def repeat(b: Builder, x: fx.Node, repeats: Sequence[int]) -> fx.Node:
    """Tile."""
    x = b.view(x, (1,) * (len(repeats) - len(_shape(x))) + _shape(x))
    for dim, n in enumerate(repeats):
        x = b.index_select(x, dim, torch.arange(_shape(x)[dim]).repeat(n))
    return x


@register_lowering(aten.slice.Tensor)
def slice_(
    b: Builder, x: fx.Node, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> fx.Node:
    """Slice one dimension."""
    return b.index_select(x, dim, torch.arange(_shape(x)[dim])[slice(start, end, step)])


@register_lowering(aten.select.int)
def select(b: Builder, x: fx.Node, dim: int, index: int) -> fx.Node:
    """Take one entry of a dimension and drop the dimension."""
    shape = list(_shape(x))
    taken = b.index_select(x, dim, torch.tensor([index % shape[dim]]))
    del shape[dim]
    return b.view(taken, shape)


@register_lowering(aten.index_select.default)
def index_select(b: Builder, x: fx.Node, dim: int, index: Tensor) -> fx.Node:
    """Take constant entries of a dimension."""
    return b.index_select(x, dim, index)


@register_lowering(aten.index.Tensor)
def index(b: Builder, x: fx.Node, indices: Sequence[Tensor | None]) -> fx.Node:
    """Index by constants, in any of PyTorch's forms."""
    if any(_encrypted(i) for i in indices):
        raise Unsupported("the index is encrypted")
    given = [i for i in indices if i is not None]
    if len(given) == 1 and given[0].dim() == 1 and given[0].dtype != torch.bool:
        dim = next(i for i, v in enumerate(indices) if v is not None)
        return b.index_select(x, dim, given[0] % _shape(x)[dim])
    numbers = torch.arange(math.prod(_shape(x))).view(_shape(x))
    taken = aten.index.Tensor(numbers, list(indices))
    flat = b.index_select(b.view(x, [-1]), 0, taken.reshape(-1))
    return b.view(flat, taken.shape)


@register_lowering(aten.split_with_sizes.default)
def split_with_sizes(
    b: Builder, x: fx.Node, sizes: Sequence[int], dim: int = 0
) -> tuple[fx.Node, ...]:
    """Split a dimension into parts of given sizes."""
    ends = torch.tensor(list(sizes)).cumsum(0).tolist()
    return tuple(
        b.index_select(x, dim, torch.arange(end - size, end))
        for size, end in zip(sizes, ends, strict=True)
    )


@register_lowering(aten.split.Tensor)
def split(b: Builder, x: fx.Node, size: int, dim: int = 0) -> tuple[fx.Node, ...]:
    """Split a dimension into equal parts."""
    total = _shape(x)[dim]
    return split_with_sizes(b, x, [min(size, total - i) for i in range(0, total, size)], dim)


@register_lowering(aten.chunk.default)
def chunk(b: Builder, x: fx.Node, chunks: int, dim: int = 0) -> tuple[fx.Node, ...]:
    """Split a dimension into a number of parts."""
    return split(b, x, -(-_shape(x)[dim] // chunks), dim)


@register_lowering(aten.unbind.int)
def unbind(b: Builder, x: fx.Node, dim: int = 0) -> tuple[fx.Node, ...]:
    """Take a dimension apart."""
    return tuple(select(b, x, dim, i) for i in range(_shape(x)[dim]))


@register_lowering(aten.flip.default)
def flip(b: Builder, x: fx.Node, dims: Sequence[int]) -> fx.Node:
    """Reverse dimensions."""
    for dim in dims:
        x = b.index_select(x, dim, torch.arange(_shape(x)[dim]).flip(0))
    return x


@register_lowering(aten.cat.default)
def cat(b: Builder, parts: Sequence[Value], dim: int = 0) -> fx.Node:
    """Concatenate; a clear part becomes an encrypted zero plus a constant."""
    some = next(p for p in parts if _encrypted(p))

    def encrypt(part: Value) -> fx.Node:
        if isinstance(part, fx.Node):
            return part
        one = b.index_select(b.view(some, [-1]), 0, torch.tensor([0]))
        grown = b.expand(b.view(one, [1] * part.dim()), part.shape)
        return b.shift(b.scale(grown, 0.0), part)

    return b.cat([encrypt(p) for p in parts if 0 not in _shape(p)], dim)


@register_lowering(aten.stack.default)
def stack(b: Builder, parts: Sequence[Value], dim: int = 0) -> fx.Node:
    """Concatenate along a new dimension."""
    rank = len(_shape(next(iter(parts))))
    dim %= rank + 1
    return cat(
        b, [unsqueeze(b, p, dim) if isinstance(p, fx.Node) else p.unsqueeze(dim) for p in parts], dim
    )


# Arithmetic ---------------------------------------------------------------------------------


@register_lowering(aten.add.Tensor, aten.add.Scalar)
def add(b: Builder, x: Value, y: Value, alpha: float = 1) -> fx.Node:
    """Add; a clear operand is a shift."""
    if alpha != 1:
        y = b.scale(y, alpha) if _encrypted(y) else y * alpha
    if _encrypted(x) and _encrypted(y):
        return b.add(x, y)
    if _encrypted(y):
        x, y = y, x
    return b.shift(_fit(b, x, y), y)


@register_lowering(aten.sub.Tensor, aten.sub.Scalar)
def sub(b: Builder, x: Value, y: Value, alpha: float = 1) -> fx.Node:
    """Subtract."""
    if _encrypted(x) and _encrypted(y) and alpha == 1:
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


@register_lowering(aten.mul.Tensor, aten.mul.Scalar)
def mul(b: Builder, x: Value, y: Value) -> fx.Node:
    """Multiply; a clear operand is a scale, the same tensor twice a square."""
    if x is y:
        return b.apply(x, aten.pow.Tensor_Scalar, 2)
    if _encrypted(x) and _encrypted(y):
        return b.mul(x, y)
    if _encrypted(y):
        x, y = y, x
    return b.scale(_fit(b, x, y), y)


@register_lowering(aten.div.Tensor, aten.div.Scalar)
def div(b: Builder, x: Value, y: Value) -> fx.Node:
    """Divide; by an encrypted tensor, multiply by its reciprocal."""
    if not _encrypted(y):
        return mul(b, x, 1.0 / torch.as_tensor(y, dtype=torch.float32))
    return mul(b, x, b.apply(y, aten.reciprocal.default))


@register_lowering(aten.pow.Tensor_Scalar)
def pow_(b: Builder, x: fx.Node, exponent: float) -> fx.Node:
    """Raise to a constant power."""
    return x if exponent == 1 else b.apply(x, aten.pow.Tensor_Scalar, exponent)


@register_lowering(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def pow_tensor(b: Builder, x: Value, y: Value) -> fx.Node:
    """Raise a constant number to an encrypted power, or the reverse."""
    if _encrypted(x) and _encrypted(y):
        raise Unsupported("base and exponent are both encrypted")
    if _encrypted(x):
        return b.apply(_fit(b, x, y), aten.pow.Tensor_Tensor, y)
    base = torch.as_tensor(x, dtype=torch.float32)
    if bool((base <= 0).any()):
        raise Unsupported("the base of an encrypted power is not positive")
    return b.apply(mul(b, y, base.log()), aten.exp.default)


@register_lowering(aten.where.self)
def where(b: Builder, condition: Value, x: Value, y: Value) -> fx.Node:
    """Choose by a mask: one operand times the mask, plus the other times its inverse."""
    if _encrypted(condition):  # zeros and ones; fused to one table if all depends on one tensor
        return add(b, mul(b, x, condition), mul(b, y, rsub(b, condition, 1.0)))
    mask = condition.to(torch.float32)
    if _encrypted(x) and _encrypted(y):
        return add(b, mul(b, x, mask), mul(b, y, 1 - mask))
    if _encrypted(y):
        x, y, condition, mask = y, x, ~condition, 1 - mask
    fill = torch.where(condition, torch.zeros(()), torch.as_tensor(y, dtype=torch.float32))
    return add(b, mul(b, x, mask), fill)


COMPARISONS = (
    aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.eq.Scalar, aten.ne.Scalar,
)
"""Steps at a constant number: zeros and ones."""


def _comparison(op: Any) -> Lowering:
    def rule(b: Builder, x: fx.Node, number: float) -> fx.Node:
        step = elementwise((op, (number,), {}), (aten.to.dtype, (torch.float32,), {}))
        return b.map(x, step, "step")

    return rule


for _op in COMPARISONS:
    LOWERINGS[_op] = _comparison(_op)


@register_lowering(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(b: Builder, x: fx.Node, mask: Value, value: Value) -> fx.Node:
    """Overwrite where a constant mask is true."""
    if _encrypted(mask):
        return where(b, mask, value, x)
    return where(b, ~mask, x, value)


# Elementwise functions ----------------------------------------------------------------------

UNARY = (
    aten.exp.default, aten.exp2.default, aten.expm1.default, aten.log.default, aten.log1p.default,
    aten.log2.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default,
    aten.tanh.default, aten.sigmoid.default, aten.erf.default, aten.gelu.default,
    aten.silu.default, aten.relu.default, aten.abs.default, aten.sin.default, aten.cos.default,
    aten.softplus.default, aten.elu.default, aten.leaky_relu.default, aten.hardtanh.default,
    aten.hardswish.default, aten.hardsigmoid.default, aten.mish.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.square.default, aten.log_sigmoid.default,
    aten.atan.default, aten.selu.default, aten.celu.default,
)
"""Functions of one tensor whose other arguments are numbers: one table each."""


def _unary(op: Any) -> Lowering:
    def rule(b: Builder, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        return b.apply(x, op, *args, **kwargs)

    return rule


for _op in UNARY:
    LOWERINGS[_op] = _unary(_op)


# Reductions ---------------------------------------------------------------------------------


@register_lowering(aten.sum.dim_IntList, aten.sum.default)
def sum_(
    b: Builder, x: fx.Node, dims: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> fx.Node:
    """Sum."""
    return b.sum(x, list(dims) if dims else range(len(_shape(x))), keepdim)


@register_lowering(aten.mean.dim, aten.mean.default)
def mean(
    b: Builder, x: fx.Node, dims: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> fx.Node:
    """Average."""
    total = sum_(b, x, dims, keepdim)
    return b.scale(total, math.prod(_shape(total)) / math.prod(_shape(x)))


@register_lowering(aten.var.correction)
def var(
    b: Builder, x: fx.Node, dims: Sequence[int] | None = None, *, correction: float | None = 1,
    keepdim: bool = False,
) -> fx.Node:
    """Average the squares of the deviations."""
    correction = 1 if correction is None else correction
    centred = b.sub(x, mean(b, x, dims, True))
    total = sum_(b, b.apply(centred, aten.pow.Tensor_Scalar, 2), dims, keepdim)
    n = math.prod(_shape(x)) // math.prod(_shape(total))
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
    b: Builder, x: fx.Node, weight: Value, bias: Value, n: int, channels: int, size: int,
    groups: int, eps: float,
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Layer norm of each group of channels, then a scale and a shift for each channel."""
    shape = _shape(x)
    flat = b.view(x, (n, groups, channels // groups * size))
    y, average, inverse = native_layer_norm(b, flat, [channels // groups * size], None, None, eps)
    y = b.view(y, shape)
    each = (channels,) + (1,) * (len(shape) - 2)
    y = y if weight is None else mul(b, y, weight.view(each))
    y = y if bias is None else add(b, y, bias.view(each))
    return y, b.view(average, (n, groups)), b.view(inverse, (n, groups))


# Matrix products ----------------------------------------------------------------------------


@register_lowering(aten.matmul.default, aten.mm.default, aten.bmm.default)
def matmul(b: Builder, x: Value, y: Value) -> fx.Node:
    """Matrix product; affine if an operand is clear."""
    if len(_shape(x)) == 1:
        lifted = b.view(x, (1, -1)) if isinstance(x, fx.Node) else x.unsqueeze(0)
        product = matmul(b, lifted, y)
        shape = _shape(product)
        return b.view(product, shape[:-1] if len(_shape(y)) == 1 else (*shape[:-2], shape[-1]))
    if len(_shape(y)) == 1:
        lifted = b.view(y, (-1, 1)) if isinstance(y, fx.Node) else y.unsqueeze(1)
        product = matmul(b, x, lifted)
        return b.view(product, _shape(product)[:-1])
    if _encrypted(x) and _encrypted(y):
        batch = torch.broadcast_shapes(_shape(x)[:-2], _shape(y)[:-2])
        return b.matmul(
            b.expand(x, batch + _shape(x)[-2:]), b.expand(y, batch + _shape(y)[-2:])
        )
    if _encrypted(x):
        return b.linear(x, y)
    product = b.linear(b.transpose(y, -2, -1), x.transpose(-2, -1))
    return b.transpose(product, -2, -1)


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
    live = torch.ones(_shape(x), dtype=torch.bool)
    while d.is_call(x, SHIFT):
        offset = d.constant(d.input_node(x, 1)).expand(_shape(x))
        hidden = offset < MASKED_BELOW
        if not bool(hidden.any()):
            break
        live &= ~hidden
        x = d.input_node(x)
        kept = torch.where(hidden, torch.zeros(()), offset)
        if bool((kept != 0).any()):
            return b.shift(x, kept), live
        if d.is_call(x, SCALE):  # a mask by where(): the factor is one on what it keeps
            factor = d.constant(d.input_node(x, 1)).expand(_shape(x))
            if bool((factor[live] == 1).all()):
                x = d.input_node(x)
    return x, live


def _softmax(b: Builder, x: fx.Node, dim: int, is_log: bool) -> fx.Node:
    rank = len(_shape(x))
    if dim % rank != rank - 1:
        turned = _softmax(b, b.transpose(x, dim % rank, rank - 1), rank - 1, is_log)
        return b.transpose(turned, dim % rank, rank - 1)
    scores, live = _split_mask(b, x)
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


@register_lowering(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    b: Builder, q: Value, k: Value, v: Value, attn_mask: Value = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> fx.Node:
    """Write attention out: scores, mask, softmax, weighted sum."""
    if dropout_p:
        raise Unsupported("dropout is active; call model.eval()")
    if enable_gqa:
        repeats = _shape(q)[-3] // _shape(k)[-3]
        heads = torch.arange(_shape(k)[-3]).repeat_interleave(repeats)

        def group(x: Value) -> Value:
            return b.index_select(x, -3, heads) if _encrypted(x) else x.index_select(-3, heads)

        k, v = group(k), group(v)
    factor = 1.0 / math.sqrt(_shape(q)[-1]) if scale is None else scale
    turned = b.transpose(k, -2, -1) if isinstance(k, fx.Node) else k.transpose(-2, -1)
    scores = b.scale(matmul(b, q, turned), factor)
    if is_causal:
        attn_mask = torch.ones(_shape(scores)[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
        scores = add(b, scores, attn_mask)
    return matmul(b, _softmax(b, scores, -1, is_log=False), v)

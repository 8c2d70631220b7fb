"""Lowerings of operators that move, repeat or drop elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import ENTER, LEAVE
from fhe_fx.passes.lowerings.registry import (
    LOWERINGS,
    Lowering,
    Unsupported,
    Value,
    aten,
    is_encrypted,
    register_lowering,
    shape_of,
)

# The identity -------------------------------------------------------------------------------


@register_lowering(
    ENTER,
    LEAVE,
    aten.clone,
    aten.alias,
    aten.detach,
    aten._to_copy,
    aten.lift_fresh_copy,
    aten.contiguous,
    aten.to,
)
def identity(b: Builder, x: fx.Node, *_: Any, **__: Any) -> fx.Node:
    """Return x."""
    return x


@register_lowering(aten.embedding.default)
def embedding(b: Builder, table: Value, rows: Value, *_: Any) -> fx.Node:
    """Take rows of a constant table by clear integers, which the client does."""
    if is_encrypted(table):
        raise Unsupported("the table of an embedding cannot be encrypted")
    if not is_encrypted(rows) or rows.meta["val"].is_floating_point():
        raise Unsupported("the rows of an embedding are chosen by integers, which stay clear")
    return b.call(d.EMBED, b.constant(table), rows)


# Structure ----------------------------------------------------------------------------------


@register_lowering(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(b: Builder, x: fx.Node, shape: Sequence[int]) -> fx.Node:
    """Reshape."""
    return b.view(x, shape)


@register_lowering(aten.unsqueeze.default)
def unsqueeze(b: Builder, x: fx.Node, dim: int) -> fx.Node:
    """Insert a dimension of size one."""
    shape = list(shape_of(x))
    shape.insert(dim % (len(shape) + 1), 1)
    return b.view(x, shape)


@register_lowering(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(b: Builder, x: fx.Node, dims: int | Sequence[int] | None = None) -> fx.Node:
    """Drop dimensions of size one."""
    rank = len(shape_of(x))
    wanted = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    drop = {dim % rank for dim in wanted}
    return b.view(x, [n for i, n in enumerate(shape_of(x)) if not (i in drop and n == 1)])


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
    return b.transpose(x, 0, 1) if len(shape_of(x)) == 2 else x


@register_lowering(aten.expand.default)
def expand(b: Builder, x: fx.Node, shape: Sequence[int], **_: Any) -> fx.Node:
    """Broadcast."""
    return b.expand(x, shape)


@register_lowering(aten.repeat.default)
def repeat(b: Builder, x: fx.Node, repeats: Sequence[int]) -> fx.Node:
    """Tile."""
    x = b.view(x, (1,) * (len(repeats) - len(shape_of(x))) + shape_of(x))
    for dim, n in enumerate(repeats):
        x = b.index_select(x, dim, torch.arange(shape_of(x)[dim]).repeat(n))
    return x


@register_lowering(aten.slice.Tensor)
def slice_(
    b: Builder,
    x: fx.Node,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> fx.Node:
    """Slice one dimension."""
    return b.index_select(x, dim, torch.arange(shape_of(x)[dim])[slice(start, end, step)])


@register_lowering(aten.select.int)
def select(b: Builder, x: fx.Node, dim: int, index: int) -> fx.Node:
    """Take one entry of a dimension and drop the dimension."""
    shape = list(shape_of(x))
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
    if any(is_encrypted(i) for i in indices):
        raise Unsupported("the index is encrypted")
    given = [i for i in indices if i is not None]
    if len(given) == 1 and given[0].dim() == 1 and given[0].dtype != torch.bool:
        dim = next(i for i, v in enumerate(indices) if v is not None)
        return b.index_select(x, dim, given[0] % shape_of(x)[dim])
    numbers = torch.arange(math.prod(shape_of(x))).view(shape_of(x))
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
    total = shape_of(x)[dim]
    return split_with_sizes(b, x, [min(size, total - i) for i in range(0, total, size)], dim)


@register_lowering(aten.chunk.default)
def chunk(b: Builder, x: fx.Node, chunks: int, dim: int = 0) -> tuple[fx.Node, ...]:
    """Split a dimension into a number of parts."""
    return split(b, x, -(-shape_of(x)[dim] // chunks), dim)


@register_lowering(aten.unbind.int)
def unbind(b: Builder, x: fx.Node, dim: int = 0) -> tuple[fx.Node, ...]:
    """Take a dimension apart."""
    return tuple(select(b, x, dim, i) for i in range(shape_of(x)[dim]))


@register_lowering(aten.flip.default)
def flip(b: Builder, x: fx.Node, dims: Sequence[int]) -> fx.Node:
    """Reverse dimensions."""
    for dim in dims:
        x = b.index_select(x, dim, torch.arange(shape_of(x)[dim]).flip(0))
    return x


@register_lowering(aten.cat.default)
def cat(b: Builder, parts: Sequence[Value], dim: int = 0) -> fx.Node:
    """Concatenate; a clear part becomes an encrypted zero plus a constant."""
    some = next(p for p in parts if is_encrypted(p))

    def encrypt(part: Value) -> fx.Node:
        if isinstance(part, fx.Node):
            return part
        one = b.index_select(b.view(some, [-1]), 0, torch.tensor([0]))
        grown = b.expand(b.view(one, [1] * part.dim()), part.shape)
        return b.shift(b.scale(grown, 0.0), part)

    return b.cat([encrypt(p) for p in parts if 0 not in shape_of(p)], dim)


@register_lowering(aten.stack.default)
def stack(b: Builder, parts: Sequence[Value], dim: int = 0) -> fx.Node:
    """Concatenate along a new dimension."""
    rank = len(shape_of(next(iter(parts))))
    dim %= rank + 1
    return cat(
        b,
        [unsqueeze(b, p, dim) if isinstance(p, fx.Node) else p.unsqueeze(dim) for p in parts],
        dim,
    )


# Any rearrangement by constants: the operator itself moves the numbers of the elements ------


def _rearrangement(op: Any) -> Lowering:
    def rule(b: Builder, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        if any(is_encrypted(a) for a in (*args, *kwargs.values())):
            raise Unsupported("what it is moved by is encrypted")
        return _taken(b, b.view(x, [-1]), op(_numbers(x), *args, **kwargs))

    return rule


def _numbers(x: Value, first: int = 0) -> Tensor:
    return torch.arange(first, first + math.prod(shape_of(x))).view(shape_of(x))


def _taken(b: Builder, flat: fx.Node, numbers: Tensor) -> fx.Node:
    return b.view(b.index_select(flat, 0, numbers.flatten()), numbers.shape)


for _op in (
    aten.unfold.default,
    aten.diagonal.default,
    aten.gather.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
):
    LOWERINGS[_op] = _rearrangement(_op)


def _both(b: Builder, x: Value, y: Value) -> fx.Node:
    """Return the elements of x, then those of y, of which one may be clear."""
    flat = [
        b.view(part, [-1]) if isinstance(part, fx.Node) else torch.as_tensor(part).reshape(-1)
        for part in (x, y)
    ]
    return cat(b, flat)


def _overwriting(op: Any) -> Lowering:
    def rule(b: Builder, x: Value, y: Value, *args: Any, **kwargs: Any) -> fx.Node:
        numbers = op(_numbers(x), _numbers(y, math.prod(shape_of(x))), *args, **kwargs)
        return _taken(b, _both(b, x, y), numbers)

    return rule


for _op in (aten.slice_scatter.default, aten.select_scatter.default):
    LOWERINGS[_op] = _overwriting(_op)


@register_lowering(aten.index_put.default)
def index_put(
    b: Builder, x: Value, indices: Sequence[Tensor | None], y: Value, accumulate: bool = False
) -> fx.Node:
    """Overwrite elements at constant places."""
    if accumulate or any(is_encrypted(i) for i in indices):
        raise Unsupported("it accumulates" if accumulate else "the index is encrypted")
    written = _numbers(y, math.prod(shape_of(x)))
    numbers = aten.index_put(_numbers(x), list(indices), written)
    return _taken(b, _both(b, x, y), numbers)


@register_lowering(aten.constant_pad_nd.default)
def constant_pad(b: Builder, x: fx.Node, pad: Sequence[int], value: float = 0.0) -> fx.Node:
    """Surround by a constant."""
    if not any(pad):
        return x
    numbers = aten.constant_pad_nd(_numbers(x), list(pad), math.prod(shape_of(x)))
    if max(pad) <= 0:
        return _taken(b, b.view(x, [-1]), numbers)
    return _taken(b, _both(b, x, torch.tensor([float(value)])), numbers)


# New tensors of the shape of an encrypted one -----------------------------------------------


def _filled(op: Any) -> Lowering:
    def rule(b: Builder, x: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {k: v for k, v in kwargs.items() if k not in {"device", "layout", "pin_memory"}}
        return op(torch.empty(shape_of(x)), *args, **kwargs)  # type: ignore[no-any-return]

    return rule


for _op in (
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
):
    LOWERINGS[_op] = _filled(_op)


@register_lowering(aten.isnan.default, aten.isinf.default)
def is_no_number(b: Builder, x: fx.Node) -> Value:
    """Answer no: an encrypted value is an integer. Exporters guard softmax by it."""
    return torch.zeros(shape_of(x), dtype=torch.bool)

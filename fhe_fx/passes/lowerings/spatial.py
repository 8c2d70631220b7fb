"""Lowerings of convolutions, pooling, resizing and batch norm in evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fhe_fx.ir.build import Builder
from fhe_fx.passes.lowerings.arithmetic import add, greatest, mul
from fhe_fx.passes.lowerings.attention import matmul
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
from fhe_fx.passes.lowerings.structure import constant_pad

# Convolution --------------------------------------------------------------------------------


@register_lowering(aten.convolution.default)
def convolution(
    b: Builder,
    x: Value,
    weight: Value,
    bias: Value,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> fx.Node:
    """Gather the elements under the kernel at each position; multiply them by clear weights."""
    if is_encrypted(weight):
        raise Unsupported("its weight is encrypted")
    if transposed:
        size = [stride, padding, dilation, transposed, output_padding, groups]
        y = _by_matrix(
            b, x, len(shape_of(x)) - 1, lambda e: aten.convolution(e, weight, None, *size)
        )
    else:
        y = _convolution(b, x, weight, stride, padding, dilation, groups)
    each = (-1,) + (1,) * (len(shape_of(x)) - 2)
    return y if bias is None else add(b, y, bias.view(each))


def _convolution(
    b: Builder,
    x: fx.Node,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> fx.Node:
    x = constant_pad(b, x, [p for p in reversed(padding) for _ in range(2)])
    n, channels, *size = shape_of(x)
    index = _windows(size, weight.shape[2:], stride, dilation)
    positions, taps = index.flatten(len(size)).shape[:-1], math.prod(weight.shape[2:])
    flat = b.index_select(b.view(x, (n, channels, -1)), 2, index.flatten())
    each = channels // groups
    under = b.view(flat, (n, groups, each, math.prod(positions), taps))
    under = b.view(b.permute(under, (0, 1, 3, 2, 4)), (n, groups, -1, each * taps))
    weights = weight.reshape(groups, -1, each * taps).transpose(1, 2)
    if groups == 1:  # one matrix for all positions
        under, weights = b.view(under, (n, -1, each * taps)), weights[0]
    return b.view(b.transpose(b.linear(under, weights), -2, -1), (n, -1, *positions))


def _windows(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the numbers of the elements under a kernel: `[*positions, *kernel]`."""
    numbers = torch.arange(math.prod(size)).view(*size)
    for dim, (k, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        numbers = numbers.unfold(dim, gap * (k - 1) + 1, step)[..., ::gap]
    return numbers


@register_lowering(aten._native_batch_norm_legit_no_training.default)
def batch_norm(
    b: Builder,
    x: fx.Node,
    weight: Value,
    bias: Value,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> tuple[fx.Node]:
    """Scale and shift each channel by clear numbers, which weights before it take in."""
    each = (-1,) + (1,) * (len(shape_of(x)) - 2)
    factor = (variance + eps).rsqrt()
    factor = factor if weight is None else factor * weight
    offset = -mean * factor if bias is None else bias - mean * factor
    return (add(b, mul(b, x, factor.view(each)), offset.view(each)),)


# Linear in x, by the matrix that the operator makes of the unit vectors ---------------------


def _by_matrix(b: Builder, x: fx.Node, rank: int, function: Callable[[Tensor], Tensor]) -> fx.Node:
    """Apply a function of the last `rank` dimensions that is linear, and alike for the others.

    Args:
        b: emits.
        x: its argument.
        rank: how many dimensions it mixes.
        function: takes a batch of arguments `[n, *mixed]`, with a dimension of one channel between
            if `rank` is less than that of x without its batch.
    """
    shape = shape_of(x)
    kept, mixed = shape[:-rank], shape[-rank:]
    n = math.prod(mixed)
    units = torch.eye(n).view(n, *(1,) * (len(kept) - 1), *mixed)
    made = function(units)
    matrix = made.reshape(n, -1)
    product = matmul(b, b.view(x, (*kept[:-1], -1, n)), matrix)
    return b.view(product, (*kept, *made.shape[-rank:]))


def _linear_spatial(op: Any, rank: int) -> Lowering:
    def rule(b: Builder, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        return _by_matrix(b, x, rank, lambda units: op(units, *args, **kwargs))

    return rule


for _op, _rank in (
    (aten.avg_pool1d.default, 1),
    (aten.avg_pool2d.default, 2),
    (aten.avg_pool3d.default, 3),
    (aten._adaptive_avg_pool2d.default, 2),
    (aten._adaptive_avg_pool3d.default, 3),
    (aten.upsample_nearest1d.vec, 1),
    (aten.upsample_nearest2d.vec, 2),
    (aten.upsample_linear1d.vec, 1),
    (aten.upsample_bilinear2d.vec, 2),
    (aten.upsample_bicubic2d.vec, 2),
):
    LOWERINGS[_op] = _linear_spatial(_op, _rank)


# Maxima -------------------------------------------------------------------------------------


@register_lowering(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def max_pool(
    b: Builder,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[fx.Node]:
    """Take the greatest element along one dimension of the windows after the other."""
    rank = len(kernel)
    pool = aten.max_pool2d_with_indices if rank == 2 else aten.max_pool3d_with_indices
    whole = torch.zeros(shape_of(x), device="meta")
    size = pool(whole, kernel, stride, padding, dilation, ceil_mode)[0].shape[-rank:]

    def each(values: Sequence[int]) -> list[int]:
        return list(values) * (rank if len(values) == 1 else 1)

    for i, (k, step, pad, gap) in enumerate(
        zip(kernel, each(stride or kernel), each(padding), each(dilation), strict=True)
    ):
        dim = len(shape_of(x)) - rank + i
        index = torch.arange(size[i])[:, None] * step + torch.arange(k) * gap - pad
        is_outside = (index < 0) | (index >= shape_of(x)[dim])
        # Outside stands an element of the window again: it cannot be greater than itself.
        inside = index.masked_fill(is_outside, -1).amax(1, keepdim=True)
        x = _greatest_of(b, x, dim, torch.where(is_outside, inside, index))
    return (x,)


@register_lowering(aten.adaptive_max_pool2d.default)
def adaptive_max_pool2d(b: Builder, x: fx.Node, size: Sequence[int]) -> tuple[fx.Node]:
    """Take the greatest element of each of `size` windows, which may overlap."""
    for dim, n in zip((-2, -1), size, strict=True):
        length = shape_of(x)[dim]
        windows = [range(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]
        longest = max(map(len, windows))
        index = torch.tensor([[w[min(k, len(w) - 1)] for k in range(longest)] for w in windows])
        x = _greatest_of(b, x, len(shape_of(x)) + dim, index)
    return (x,)


def _greatest_of(b: Builder, x: fx.Node, dim: int, index: Tensor) -> fx.Node:
    """Return the greatest of the elements `index[p]` of a dimension, for every p."""
    shape = shape_of(x)
    taken = b.index_select(x, dim, index.flatten())
    split = b.view(taken, (*shape[:dim], *index.shape, *shape[dim + 1 :]))
    return greatest(b, split, [dim + 1])

"""Products of an encrypted tensor with clear values that each run brings, and softmax under a mask.

A mask that calls bring is a clear factor of zeros and ones, which costs nothing. Other clear values
are rounded to integers of eight bits. What depends on clear inputs alone is computed by the client
before it encrypts, so rules see it as a node of the graph that `is_clear`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.passes.lowerings.registry import Unsupported, aten, shape_of

__all__ = ["clear_matmul", "gate", "gated_softmax"]

_LARGEST = 127
"""Greatest integer of a clear factor that is no integer itself."""


def gate(b: Builder, x: fx.Node, factor: fx.Node) -> fx.Node:
    """Multiply an encrypted tensor by a clear one, broadcast against each other.

    Numbers are rounded to 127 steps of the greatest that calibration samples hold, masks and
    integers not at all.
    """
    shape = torch.broadcast_shapes(shape_of(x), shape_of(factor))
    x, step = b.expand(x, shape), None
    whole = b.computed(aten.to.dtype, factor, torch.float32)
    if factor.meta["val"].is_floating_point():
        step = max(_greatest(factor), 1e-30) / _LARGEST
        whole = b.computed(aten.round.default, b.computed(aten.div.Scalar, whole, step))
        whole = b.computed(aten.clamp.default, whole, -_LARGEST, _LARGEST)
    # A value of its own: what a gate reads is clear, what a sum reads of the same is encrypted.
    gated = b.gate(x, b.computed(aten.expand.default, whole, list(shape)))
    return gated if step is None else b.scale(gated, step)


def clear_matmul(b: Builder, x: fx.Node, factor: fx.Node) -> fx.Node:
    """Multiply encrypted rows by a clear matrix on the right: products, and their sums."""
    rows = b.view(x, (*shape_of(x), 1))
    products = gate(b, rows, b.computed(aten.unsqueeze.default, factor, -3))
    return b.sum(products, [-2])


def gated_softmax(b: Builder, x: fx.Node, live: fx.Node, *, is_log: bool) -> fx.Node:
    """Softmax over the last dimension among the entries that a clear mask leaves, else zero.

    Entries fold in a tree, as under a constant mask: of a and b, where both are live,
    a + softplus(b - a); where one is, that one. Which is the case the client knows, so each choice
    is a product with zeros and ones.

    Args:
        b: writes the nodes.
        x: scores.
        live: clear booleans that broadcast to the shape of the scores.
        is_log: whether the logarithm is wanted.
    """
    shape = shape_of(x)
    live = b.computed(aten.expand.default, live, list(shape))
    total, left = x, live
    while (n := shape_of(total)[-1]) > 1:
        first, second = (torch.arange(start, n - n % 2, 2) for start in (0, 1))
        odd = torch.arange(n - n % 2, n)
        (a, c), (has_a, has_c) = (
            [pick(y, i) for i in (first, second)]
            for y, pick in ((total, _picked(b)), (left, _picked_clear(b)))
        )
        both = b.computed(aten.logical_and.default, has_a, has_c)
        only = b.computed(
            aten.logical_and.default, has_c, b.computed(aten.logical_not.default, has_a)
        )
        rise = b.sub(c, a)
        rest = gate(b, b.apply(rise, aten.softplus.default), both)
        folded = b.add(a, b.add(rest, gate(b, rise, only)))
        has = b.computed(aten.logical_or.default, has_a, has_c)
        if len(odd):
            folded = b.cat([folded, _picked(b)(total, odd)], -1)
            has = b.computed(aten.cat.default, [has, _picked_clear(b)(left, odd)], -1)
        total, left = folded, has
    result = b.sub(x, b.expand(total, shape))
    return gate(b, result if is_log else b.apply(result, aten.exp.default), live)


def _picked(b: Builder) -> Any:
    return lambda x, index: b.index_select(x, -1, index)


def _picked_clear(b: Builder) -> Any:
    return lambda x, index: b.computed(aten.index_select.default, x, -1, index)


def _greatest(factor: fx.Node) -> float:
    """Return the greatest magnitude of a clear value on the calibration samples."""
    inputs = [n for n in factor.graph.nodes if n.op == "placeholder"]
    n_samples = min((len(n.meta.get("samples", ())) for n in inputs), default=0)
    if not n_samples:
        raise Unsupported("it multiplies by a clear number whose size no calibration sample shows")
    return max(float(_seen(factor, k, {}).abs().max()) for k in range(n_samples))


def _seen(node: fx.Node, sample: int, known: dict[fx.Node, Tensor]) -> Tensor:
    """Return a clear value on one calibration sample."""

    def load(n: fx.Node) -> Tensor:
        if n not in known:
            known[n] = _seen(n, sample, known)
        return known[n]

    if node.op == "placeholder":
        return cast(Tensor, node.meta["samples"][sample])
    if node.op == "get_attr":
        return d.constant(node)
    args: Any = fx.node.map_arg(node.args, load)
    kwargs: Any = fx.node.map_arg(node.kwargs, load)
    return cast(Tensor, cast(Any, node.target)(*args, **kwargs))

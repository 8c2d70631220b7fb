"""Move selections of entries towards the inputs, so that what nobody reads is never computed.

Exact. A split of a projection becomes several narrow projections; choosing heads narrows the
weights that make them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import LINEAR, MASKED_SOFTMAX, SCALE, SHIFT
from fhe_fx.ir.program import Program
from fhe_fx.ir.views import IndexSelect, MaskedSoftmax, Permute
from fhe_fx.passes.base import Pass, register

__all__ = ["SinkSelections"]


@register
@dataclass(frozen=True)
class SinkSelections(Pass):
    """Commute `index_select` with the operator before it, where all users of that select."""

    name: ClassVar[str] = "sink-selections"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Rewrite until nothing moves."""
        changed = False
        while any([self._step(program, n) for n in program.calls(d.INDEX_SELECT)]):  # noqa: C419 -- all
            changed = True
            program.clean()
        return changed

    def _step(self, program: Program, node: fx.Node) -> bool:
        select = IndexSelect.of(node)
        x, dim, index = select.x, select.dim, select.index
        if x.op == "placeholder" or node.meta.get("is_outside"):
            return False
        if not all(d.is_call(u, d.INDEX_SELECT) for u in x.users):
            return False
        if len(torch.unique(index)) < len(index):
            return False  # it repeats entries: better done late
        if len(x.users) > 1 and not d.is_call(x, *d.AFFINE):
            program.note(self, node, f"{x.name} has look-ups that its {len(x.users)} readers share")
            return False
        new = _commute(program.before(node, self, x), x, dim, index)
        if new is None:
            return False
        program.replace(node, new)
        return True


def _commute(b: Builder, x: fx.Node, dim: int, index: Tensor) -> fx.Node | None:
    """Return `index_select(x, dim, index)` with the selection before x's operator, or None."""

    def pick(n: fx.Node) -> fx.Node:
        return b.index_select(n, dim, index)

    def pick_constant(n: fx.Node) -> Tensor:
        c = d.constant(n)
        at = dim - (len(d.shape_of(x)) - c.dim())
        return c if at < 0 or c.shape[at] == 1 else c.index_select(at, index)

    source = d.input_node(x) if x.args and isinstance(x.args[0], fx.Node) else None
    if source is None:
        return None
    rank = len(d.shape_of(x))
    if d.is_call(x, d.INDEX_SELECT):
        inner = IndexSelect.of(x)
        if inner.dim == dim:
            return b.index_select(source, dim, inner.index[index])
        return None
    if d.is_call(x, d.PERMUTE):
        dims = Permute.of(x).dims
        return b.permute(b.index_select(source, dims[dim], index), dims)
    if d.is_call(x, d.VIEW):
        return _through_view(b, x, source, dim, index)
    if d.is_call(x, SCALE):
        return b.scale(pick(source), pick_constant(d.input_node(x, 1)))
    if d.is_call(x, SHIFT):
        return b.shift(pick(source), pick_constant(d.input_node(x, 1)))
    if d.is_call(x, d.ADD, d.SUB, d.MUL):
        left, right = (pick(cast(fx.Node, a)) for a in x.args)
        return b.call(x.target, left, right)
    if d.is_map(x) and not any(c.numel() > 1 for c in d.map_of(x).buffers()):
        return b.map(pick(source), d.map_of(x), str(x.target).rstrip("0123456789").rstrip("_"))
    if d.is_call(x, LINEAR):
        weight = d.constant(d.input_node(x, 1))
        if dim == rank - 1:
            return b.linear(source, weight.index_select(-1, index))
        if weight.dim() == 2:
            return b.linear(pick(source), weight)
        return None
    if d.is_call(x, d.MATMUL):
        other = d.input_node(x, 1)
        left = pick(source) if dim != rank - 1 else source
        right = pick(other) if dim != rank - 2 else other
        return b.matmul(left, right)
    if d.is_call(x, MASKED_SOFTMAX) and dim != rank - 1:
        live = pick_constant(d.input_node(x, 1))
        return b.masked_softmax(pick(source), live, MaskedSoftmax.of(x).is_log)
    return None


def _through_view(
    b: Builder, x: fx.Node, source: fx.Node, dim: int, index: Tensor
) -> fx.Node | None:
    """Select before a reshape that takes one input dimension apart, or leaves it alone."""
    inside, outside = d.shape_of(source), d.shape_of(x)
    start = math.prod(outside[:dim])
    for axis, size in enumerate(inside):
        lead = math.prod(inside[:axis])
        group = [
            i
            for i in range(len(outside))
            if math.prod(outside[:i]) >= lead
            and math.prod(outside[: i + 1]) <= lead * size
            and not (outside[i] == 1 and i != dim)
        ]
        if dim not in group or math.prod(outside[i] for i in group) != size or lead > start:
            continue
        numbers = torch.arange(size).view([outside[i] for i in group])
        chosen = numbers.index_select(group.index(dim), index).reshape(-1)
        shape = [len(index) if i == dim else n for i, n in enumerate(outside)]
        return b.view(b.index_select(source, axis, chosen), shape)
    return None

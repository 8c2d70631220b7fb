"""Take an attention apart by heads, and mark the chosen ones as the encrypted region.

Exact to float rounding. The heads are the batch dimension of the two matrix products around a
softmax; the chosen ones are computed apart, from projections that make nothing else, so that the
region holds their q, k, v weights and the client the others'. A rotary embedding between weights
and product is composed into the weights, and each position then has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from fhe_fx.errors import TargetError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.chains import AffineChain
from fhe_fx.ir.ops import MASKED_SOFTMAX, SCALE, SHIFT
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.passes.sink_selections import SinkSelections

__all__ = ["SelectHeads"]


@register
@dataclass(frozen=True)
class SelectHeads(Pass):
    """Split each attention into chosen and other heads; mark what only the chosen ones need."""

    name: ClassVar[str] = "select-heads"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    gives: ClassVar[frozenset[str]] = frozenset({"annotated"})

    heads: tuple[int, ...] = ()
    """Numbers of the heads to encrypt."""

    def run(self, program: Program) -> bool:
        """Rewrite, then mark.

        Raises:
            TargetError: if there is no attention, or a head that does not exist is named.
        """
        SinkSelections().run(program)
        cores = [c for c in map(_core, program.calls(MASKED_SOFTMAX)) if c is not None]
        if not cores:
            raise TargetError(
                f"{program.name} holds no attention with several heads, so "
                f"heads={list(self.heads)} selects nothing. "
                "Leave heads out, or choose an attention module."
            )
        chosen = [self._split(program, core) for core in cores]
        program.clean()
        SinkSelections().run(program)
        self._mark(program, chosen)
        return True

    def _split(self, program: Program, product: fx.Node) -> fx.Node:
        n_heads = d.shape_of(product)[-3]
        bad = [h for h in self.heads if not 0 <= h < n_heads]
        if bad or len(set(self.heads)) != len(self.heads) or not self.heads:
            raise TargetError(
                f"heads={list(self.heads)} does not name distinct heads of {program.name}, which "
                f"has {n_heads}: 0 to {n_heads - 1}."
            )
        others = [h for h in range(n_heads) if h not in self.heads]
        b = program.before(product, self)
        first = _copy_heads(b, product, torch.tensor(self.heads))
        first.meta["chosen_heads"] = True
        if not others:
            program.replace(product, first)
            return first
        second = _copy_heads(b, product, torch.tensor(others))
        order = torch.tensor([*self.heads, *others]).argsort()
        axis = len(d.shape_of(product)) - 3
        program.replace(product, b.index_select(b.cat([first, second], axis), axis, order))
        return first

    @staticmethod
    def _mark(program: Program, chosen: list[fx.Node]) -> None:
        """Mark the chosen products and whatever is read by marked nodes alone."""
        heads = {n for n in program.graph.nodes if n.meta.get("chosen_heads")}
        marked: set[fx.Node] = set(heads) or set(chosen)
        for node in reversed(list(program.graph.nodes)):
            if node.op not in {"call_function", "call_module"} or node.meta.get("is_outside"):
                continue
            if node in marked or (node.users and all(u in marked for u in node.users)):
                marked.add(node)
                node.meta["encrypted"] = True


def _core(softmax: fx.Node) -> fx.Node | None:
    """Return the product of attention weights and values that a softmax feeds."""
    if len(softmax.users) != 1:
        return None
    product = next(iter(softmax.users))
    is_left = d.is_call(product, d.MATMUL) and product.args[0] is softmax
    return product if is_left and len(d.shape_of(product)) >= 3 else None


def _copy_heads(b: Builder, node: fx.Node, heads: Tensor) -> fx.Node:
    """Build the attention around `node` again for some heads only."""
    axis = len(d.shape_of(node)) - 3

    def pick_constant(n: fx.Node, rank: int) -> Tensor:
        c = d.constant(n)
        at = axis - (rank - c.dim())
        return c if at < 0 or c.shape[at] == 1 else c.index_select(at, heads)

    if d.is_call(node, SCALE, SHIFT, MASKED_SOFTMAX):
        x = _copy_heads(b, d.input_node(node), heads)
        c = pick_constant(d.input_node(node, 1), len(d.shape_of(node)))
        if d.is_call(node, SCALE):
            return b.scale(x, c)
        return b.shift(x, c) if d.is_call(node, SHIFT) else b.masked_softmax(x, c, False)
    if d.is_call(node, d.MATMUL):
        left, right = (cast(fx.Node, a) for a in node.args)
        if d.is_call(left, MASKED_SOFTMAX):
            return b.matmul(_copy_heads(b, left, heads), _pick(b, right, axis, heads))
        return b.matmul(_pick(b, left, axis, heads), _pick(b, right, axis, heads))
    return b.index_select(node, axis, heads)


def _pick(b: Builder, x: fx.Node, axis: int, heads: Tensor) -> fx.Node:
    """Take some heads of an operand, made by weights of their own where weights make it."""
    picked = b.index_select(x, axis, heads)
    chain = AffineChain.of(picked)
    if chain.reason_against_one_product() is not None:
        return picked
    return chain.as_one_product(b)

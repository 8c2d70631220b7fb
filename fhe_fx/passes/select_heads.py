"""Take an attention apart by heads, and mark the chosen ones as the encrypted region.

Exact to float rounding. The heads are the batch dimension of the two matrix products around a
softmax, which under a clear mask is many operators; the chosen ones are computed apart, from
projections that make nothing else, so that the region holds their q, k, v weights and the client
the others'. A rotary embedding between weights and product is composed into the weights, and each
position then has its own. Of a clear mask the region takes the entries of its heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.errors import CaptureError, TargetError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.chains import AffineChain
from fhe_fx.ir.ops import GATE, MASKED_SOFTMAX, SCALE, SHIFT
from fhe_fx.ir.program import Program
from fhe_fx.passes.annotate import check_convex
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
            TargetError: if there is no attention, a head that does not exist is named, or heads of
                several attentions are not one region.
        """
        SinkSelections().run(program)
        cores = [core for core in map(_Core.of, program.calls(d.MATMUL)) if core is not None]
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
        try:
            check_convex(program, program.name)
        except CaptureError as error:
            raise TargetError(
                f"{program.name} holds {len(cores)} attentions, and between "
                f"heads={list(self.heads)} of one and of the next the client would have to "
                f"compute; a circuit cannot stop for it. Choose one attention, or a list of them, "
                f"each a part of its own."
            ) from error
        return True

    def _split(self, program: Program, core: _Core) -> fx.Node:
        bad = [h for h in self.heads if not 0 <= h < core.n_heads]
        if bad or len(set(self.heads)) != len(self.heads) or not self.heads:
            raise TargetError(
                f"heads={list(self.heads)} does not name distinct heads of {program.name}, which "
                f"has {core.n_heads}: 0 to {core.n_heads - 1}."
            )
        others = [h for h in range(core.n_heads) if h not in self.heads]
        b = program.before(core.product, self)
        first = _Copy(b, core, torch.tensor(self.heads)).of(core.product)
        first.meta["chosen_heads"] = True
        if not others:
            program.replace(core.product, first)
            return first
        second = _Copy(b, core, torch.tensor(others)).of(core.product)
        order = torch.tensor([*self.heads, *others]).argsort()
        whole = b.index_select(b.cat([first, second], core.axis), core.axis, order)
        program.replace(core.product, whole)
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


@dataclass(frozen=True)
class _Core:
    """Two matrix products with a softmax between, whose batch dimension is the heads."""

    product: fx.Node
    """Attention weights by values."""
    weights: frozenset[fx.Node]
    """What makes the attention weights, from the scores on, each head by itself."""

    @property
    def axis(self) -> int:
        """The dimension that counts heads."""
        return len(d.shape_of(self.product)) - 3

    @property
    def n_heads(self) -> int:
        """How many there are."""
        return d.shape_of(self.product)[self.axis]

    @staticmethod
    def of(product: fx.Node) -> _Core | None:
        """Read the attention that ends with a matrix product, or return None."""
        if len(d.shape_of(product)) < 3:
            return None
        alone = _Core(product, frozenset())
        inside, wanted = {product}, {d.input_node(product)}
        for node in reversed(product.graph.nodes):
            if node in wanted and inside.issuperset(node.users) and alone.keeps_heads_apart(node):
                inside.add(node)
                # Behind the scores are queries and keys, which weights make of several heads.
                wanted |= set() if d.is_call(node, d.MATMUL) else set(d.operands(node))
        weights = frozenset(inside - {product})
        has_softmax = any(d.is_call(n, MASKED_SOFTMAX, GATE) for n in weights)  # gates: its mask
        return _Core(product, weights) if has_softmax else None

    def keeps_heads_apart(self, node: fx.Node) -> bool:
        """Say whether what a node computes for a head depends on what it reads of that head."""
        rank, shape = len(d.shape_of(self.product)), d.shape_of(node)
        if node.meta.get("is_outside") or len(shape) != rank or shape[self.axis] != self.n_heads:
            return False
        if d.is_map(node):
            return not any(c.numel() > 1 for c in d.map_of(node).buffers())
        if d.is_call(node, d.INDEX_SELECT, d.CAT):
            return bool(node.args[1] != self.axis)
        if d.is_call(node, d.EXPAND):
            return d.shape_of(d.input_node(node))[-3:-2] == (self.n_heads,)
        return d.is_call(node, d.MATMUL, d.ADD, d.SUB, d.MUL, SCALE, SHIFT, GATE, MASKED_SOFTMAX)


class _Copy:
    """Builds an attention again for some heads only."""

    def __init__(self, b: Builder, core: _Core, heads: Tensor) -> None:
        self.b, self.core, self.heads = b, core, heads
        self._made: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> fx.Node:
        """Return the node for these heads; what is not of the attention is taken by entries."""
        if node not in self._made:
            is_inside = node is self.core.product or node in self.core.weights
            self._made[node] = self._again(node) if is_inside else self._entries(node)
        return self._made[node]

    def _again(self, node: fx.Node) -> fx.Node:
        if d.is_map(node):
            hint = str(node.target).rstrip("0123456789").rstrip("_")
            return self.b.map(self.of(d.input_node(node)), d.map_of(node), hint)
        if d.is_call(node, d.EXPAND):
            shape = list(d.shape_of(node))
            shape[self.core.axis] = len(self.heads)
            return self.b.expand(self.of(d.input_node(node)), shape)
        return self.b.call(node.target, *fx.node.map_arg(node.args, self.of))

    def _entries(self, node: fx.Node) -> fx.Node:
        """Take the heads of an operand, made by weights of their own where weights make it."""
        b, axis = self.b, self.core.axis
        if node.op == "get_attr":
            c = d.constant(node)
            at = c.dim() - 3
            return b.constant(c.index_select(at, self.heads)) if _counts_heads(c) else node
        if node.meta.get("is_outside"):  # the client's, who encrypts it unless it is clear
            mine = b.computed(d.INDEX_SELECT, node, axis, self.heads)
            return mine if node.meta.get("clear") else b.promoted(mine)
        picked = b.index_select(node, axis, self.heads)
        chain = AffineChain.of(picked)
        if chain.reason_against_one_product() is not None:
            return picked
        return chain.as_one_product(b)


def _counts_heads(constant: Tensor) -> bool:
    """Say whether a constant of the scores, a scale or a mask, differs from head to head."""
    return constant.dim() >= 3 and constant.shape[-3] > 1

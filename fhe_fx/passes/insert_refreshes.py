"""Read a long clear-weight sum through an identity look-up before it is weighted again.

Exact in float. Weights on top of weights multiply widths and noise: an accumulator over many terms
has twenty bits. A table of `lookup_bits` gives it back narrow. Costs one look-up an element, and
saves the far larger parameters that the wide encoding would impose on every other look-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["InsertRefreshes"]


@register
@dataclass(frozen=True)
class InsertRefreshes(Pass):
    """Insert identity maps on affine paths from a long clear-weight sum to the next."""

    name: ClassVar[str] = "insert-refreshes"
    requires: ClassVar[frozenset[str]] = frozenset({"fused"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Walk back from each long sum through affine operators."""
        done: dict[fx.Node, fx.Node] = {}
        long = [n for n in program.calls(LINEAR) if _is_long(program, n)]
        for node in long:
            self._visit(program, d.input_node(node), node, done, set(long))
        return bool(done)

    def _visit(
        self,
        program: Program,
        node: fx.Node,
        user: fx.Node,
        done: dict[fx.Node, fx.Node],
        wide: set[fx.Node],
    ) -> None:
        head = node
        while d.is_call(node, *(d.AFFINE - {d.ADD, d.SUB, d.CAT, LINEAR})):
            node = d.input_node(node)
        if d.is_call(node, d.ADD, d.SUB, d.CAT):
            for operand in list(dict.fromkeys(d.operands(node))):
                self._visit(program, operand, node, done, wide)
        elif node in wide:
            place = _narrowest(head, node)
            if place not in done:
                after = place.next
                b = program.before(after, self, place)
                function = fx.Graph()
                function.output(function.placeholder("x"))
                done[place] = b.map(place, fx.GraphModule(torch.nn.Module(), function), "refresh")
            affected = user if place is head else _reader(head, place)
            affected.replace_input_with(place, done[place])


def _is_long(program: Program, node: fx.Node) -> bool:
    weight = d.constant(d.input_node(node, 1))
    return weight.shape[-2] >= program.options.refresh_from


def _narrowest(head: fx.Node, linear: fx.Node) -> fx.Node:
    """Return the node with fewest elements on the single path from `linear` to `head`."""
    best, node = head, head
    while node is not linear:
        node = d.input_node(node)
        if math.prod(d.shape_of(node)) <= math.prod(d.shape_of(best)):
            best = node
    return best


def _reader(head: fx.Node, place: fx.Node) -> fx.Node:
    """Return the node on the path from `place` to `head` that reads `place`."""
    node = head
    while d.input_node(node) is not place:
        node = d.input_node(node)
    return node

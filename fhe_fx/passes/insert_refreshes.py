"""Read a long clear-weight sum through an identity look-up before it is returned or weighted again.

Exact in float. A result is decrypted with every bit of its encoding, and weights on top of weights
multiply widths and noise: an accumulator over many terms has twenty bits. A table of `lookup_bits`
gives it back narrow. Costs one look-up an element, and saves the far larger parameters that the
wide encoding would impose on every other look-up.
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
    """Insert identity maps on affine paths from a long clear-weight sum to a result or weight."""

    name: ClassVar[str] = "insert-refreshes"
    requires: ClassVar[frozenset[str]] = frozenset({"fused"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Walk back from each result and each long sum through affine operators."""
        done: dict[fx.Node, fx.Node] = {}
        beside = _beside_look_ups(program)
        for result in program.results:
            self._visit(program, result, program.output_node, done, beside)
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


def _beside_look_ups(program: Program) -> set[fx.Node]:
    """Return the clear-weight sums whose encoding a look-up writes or reads.

    Elsewhere a wide result costs nothing: no bootstrap has to be as wide. Beside a look-up, ten
    bits of a result would leave two to the weights, so a short sum is refreshed too. Inputs join
    nothing: `split-inputs` gives each encoding a ciphertext of its own.
    """
    parent = {n: n for n in program.encrypted()}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in program.encrypted():
        for source in [] if d.is_map(node) else d.operands(node):
            if source.op != "placeholder":
                parent[root(source)] = root(node)
    looked = {root(n) for n in program.maps()} | {
        root(d.input_node(n)) for n in program.maps() if d.input_node(n).op != "placeholder"
    }
    return {n for n in program.calls(LINEAR) if root(n) in looked}


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

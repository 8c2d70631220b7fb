"""Fuse every elementwise computation of one tensor into one function of it: one table each.

Exact to float rounding. GELU written as nine operators, x * sigmoid(x), a scale before or behind a
function: all read one encrypted value, so one look-up an element answers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import hold, inline
from fhe_fx.ir.ops import SCALE, SHIFT
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["FuseMaps"]

aten = torch.ops.aten
_BINARY = {SCALE: aten.mul.Tensor, SHIFT: aten.add.Tensor}


@register
@dataclass(frozen=True)
class FuseMaps(Pass):
    """Replace each largest elementwise expression of one tensor by one map of that tensor."""

    name: ClassVar[str] = "fuse-maps"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    gives: ClassVar[frozenset[str]] = frozenset({"fused"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Find the expressions first, then write them."""
        roots: dict[fx.Node, fx.Node] = {}
        curved: set[fx.Node] = set()  # depends on its root by more than an affine map
        for node in program.encrypted():
            if not (d.is_map(node) or d.is_call(node, SCALE, SHIFT, d.ADD, d.SUB, d.MUL)):
                continue
            sources = {roots.get(n, n) for n in d.operands(node)}
            if len(sources) != 1:
                continue
            if d.is_call(node, SCALE, SHIFT) and not curved & set(d.operands(node)):
                plain = [u for u in node.users if d.is_map(u) or d.is_call(u, SCALE, SHIFT)]
                if 1 < len(node.users) != len(plain):
                    continue  # an accumulator that others read too: one for all of them
            roots[node] = sources.pop()
            if d.is_map(node) or d.is_call(node, d.MUL) or curved & set(d.operands(node)):
                curved.add(node)
        heads = [n for n in roots if n in curved and self._is_head(n, roots)]
        written = {n: self._compose(n, roots[n], roots) for n in heads}
        changed = False
        for node, function in written.items():
            if d.is_map(node) and d.input_node(node) is roots[node]:
                continue  # a single map already
            b = program.before(node, self)
            program.replace(node, b.map(roots[node], function, _hint(node, roots)))
            changed = True
        return changed

    @staticmethod
    def _is_head(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> bool:
        """Say whether someone outside the expression reads this node."""
        return any(u not in roots or roots[u] is not roots[node] for u in node.users)

    @staticmethod
    def _compose(head: fx.Node, root: fx.Node, roots: dict[fx.Node, fx.Node]) -> fx.GraphModule:
        holder, graph = torch.nn.Module(), fx.Graph()
        done = {root: graph.placeholder("x")}

        def emit(node: fx.Node) -> fx.Node:
            if node in done:
                return done[node]
            if d.is_map(node):
                done[node] = inline(holder, graph, d.map_of(node), emit(d.input_node(node)))
            elif d.is_call(node, SCALE, SHIFT):
                value = d.constant(d.input_node(node, 1))
                operand = value.item() if value.numel() == 1 else hold(holder, graph, value)
                x = emit(d.input_node(node))
                done[node] = graph.call_function(_BINARY[node.target], (x, operand))  # type: ignore[index]
            else:
                args = tuple(emit(cast(fx.Node, a)) for a in node.args)
                done[node] = graph.call_function(node.target, args)  # type: ignore[arg-type]
            return done[node]

        graph.output(emit(head))
        return fx.GraphModule(holder, graph)


def _hint(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> str:
    """Name a fused function after its last named map."""
    while node in roots:
        if d.is_map(node):
            return cast(str, node.target).rstrip("0123456789").rstrip("_")
        node = d.operands(node)[0]
    return "product"

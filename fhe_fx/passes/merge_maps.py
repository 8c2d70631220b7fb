"""Look a value up once where several look-ups give the same answers.

Exact. Nodes are numbered by what they compute (Click 1995, "Global code motion, global value
numbering", section 3): the same operator of the same values has the same number. Of maps with one
number the first stays, and each of the others saves a look-up an element. What is affine stays
as it is, since a copy costs nothing and its encoding may be narrower than the original's.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["MergeMaps"]


@register
@dataclass(frozen=True)
class MergeMaps(Pass):
    """Let all readers of equal maps read the first of them."""

    name: ClassVar[str] = "merge-maps"
    requires: ClassVar[frozenset[str]] = frozenset({"fused"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Number the nodes in order, and replace what was there before."""
        numbers: dict[Hashable, int] = {}
        of: dict[fx.Node, int] = {}
        first: dict[int, fx.Node] = {}
        changed = False
        for node in list(program.graph.nodes):
            if node.op == "output":
                continue
            of[node] = numbers.setdefault(_key(node, of), len(numbers))
            if not d.is_map(node):
                continue
            kept = first.setdefault(of[node], node)
            if kept is not node:
                program.replace(node, kept)
                changed = True
        program.clean()
        return changed


def _key(node: fx.Node, numbers: dict[fx.Node, int]) -> Hashable:
    """Return what a node computes: equal for two nodes only if their values are."""
    if node.op == "placeholder":
        return node
    if node.op == "get_attr":
        return _contents(d.constant(node))
    inputs = fx.node.map_arg(node.args, lambda n: ("value", numbers[n]))
    if d.is_map(node):
        function = d.map_of(node)
        constants = tuple((name, _contents(c)) for name, c in function.named_buffers())
        return "map", function.code, constants, repr(inputs)
    return str(node.target), repr(inputs)


def _contents(constant: Tensor) -> Hashable:
    return str(constant.dtype), tuple(constant.shape), constant.numpy().tobytes()

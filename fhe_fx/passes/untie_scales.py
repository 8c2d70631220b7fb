"""Let a value be finer behind clear weights than before them, also where both are added.

Exact: factors of one are inserted. In l(x) + x the sum ties the scale of x to that of l(x), and
the weights of l, which are the ratio of the two, would round to nothing. A factor of one in front
of the sum is an integer multiplication that takes x from its own scale to the finer one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR, SCALE
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.classes import absorbed_scales, find_classes, is_exact_scale

__all__ = ["UntieScales"]


@register
@dataclass(frozen=True)
class UntieScales(Pass):
    """Insert `scale(x, 1)` at sums that close a cycle between scale classes."""

    name: ClassVar[str] = "untie-scales"
    requires: ClassVar[frozenset[str]] = frozenset({"inputs-split"})
    gives: ClassVar[frozenset[str]] = frozenset({"untied"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Cut one cycle after the other."""
        changed = False
        while (weighted := _on_a_cycle(program)) is not None:
            found = _closing_sum(program, weighted)
            if found is None:
                program.note(self, weighted, "its input and its result need one scale")
                break
            total, other = found
            total.replace_input_with(other, program.before(total, self).scale(other, 1.0))
            program.clean()
            changed = True
        return changed


def _on_a_cycle(program: Program) -> fx.Node | None:
    """Return the first weighted node whose result shares a scale with its input, if any."""
    import networkx as nx  # slow to import

    classes = find_classes(program)
    absorbed = absorbed_scales(program)
    weighted = [
        n for n in program.calls(LINEAR, SCALE) if n not in absorbed and not is_exact_scale(n)
    ]
    graph: nx.DiGraph[int] = nx.DiGraph()
    ends = {}
    for node in weighted:
        before, after = (torch.unique(classes.of[n]).tolist() for n in (d.input_node(node), node))
        ends[node] = before, after
        # One vertex stands for all classes of a node: they are widened together.
        graph.add_edges_from((c, ("in", node)) for c in before)
        graph.add_edges_from((("in", node), c) for c in after)
    part = {v: i for i, s in enumerate(nx.strongly_connected_components(graph)) for v in s}
    for node, (before, after) in ends.items():
        if {part[c] for c in before} & {part[c] for c in after}:
            return node
    return None


def _closing_sum(program: Program, weighted: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the first sum of something made by `weighted` with something that is not."""
    made = {weighted}
    for node in program.encrypted():
        if d.is_map(node) or not any(n in made for n in d.operands(node)):
            continue
        made.add(node)
        if d.is_call(node, d.ADD, d.SUB):
            rest = [n for n in d.operands(node) if n not in made]
            if rest and not _is_free(rest[0]):
                return node, rest[0]
    return None


def _is_free(node: fx.Node) -> bool:
    """Say whether a value has a scale of its own already."""
    return d.is_call(node, SCALE) and bool((d.constant(d.input_node(node, 1)) == 1).all())

"""Multiply what inputs alone make, and what look-ups answered, by clear weights apart.

Exact to float rounding: a product with clear weights distributes over sums. In W (a + V x), where
look-ups answered a, the inner product V x would have to be read through a look-up to become narrow;
W a + (W V) x has the two products made one, which costs nothing, and no noise of a look-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.chains import AffineChain
from fhe_fx.ir.ops import LINEAR, SHIFT
from fhe_fx.ir.program import Program
from fhe_fx.ir.views import Cat
from fhe_fx.passes.base import Pass, register

__all__ = ["DistributeLinears"]


@register
@dataclass(frozen=True)
class DistributeLinears(Pass):
    """Split every product of a sum of answers and of products of an input."""

    name: ClassVar[str] = "distribute-linears"
    requires: ClassVar[frozenset[str]] = frozenset({"fused"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Split at the outer product."""
        changed = False
        for node in program.calls(LINEAR):
            chain = AffineChain.of(node)
            inputs = [s for s in chain.sources if s.op == "placeholder"]
            answers = [s for s in chain.sources if s.op != "placeholder"]
            n_inner = sum(d.is_call(n, LINEAR) for n in _between(chain, inputs)) - 1
            if not inputs or not answers or not n_inner:
                continue
            if len(inputs) > 1:
                program.note(self, node, f"it multiplies {len(inputs)} inputs besides answers")
                continue
            of_input = chain.of_source(inputs[0])
            if (reason := of_input.reason_against_one_product()) is not None:
                program.note(self, node, reason)
                continue
            b = program.before(node, self)
            alone = _Alone(b, set(answers)).of(d.input_node(node))
            assert alone is not None
            product = b.call(LINEAR, alone, node.args[1])
            program.replace(node, b.add(of_input.as_one_product(b), product))
            changed = True
        program.clean()
        return changed


def _between(chain: AffineChain, sources: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes of a chain that depend on some of its sources."""
    found = set(sources)
    for node in chain.nodes:
        if any(n in found for n in d.operands(node)):
            found.add(node)
    return found - set(sources)


class _Alone:
    """Writes an affine graph again, with all but some of its sources zero."""

    def __init__(self, b: Builder, kept: set[fx.Node]) -> None:
        self._b = b
        self._found: dict[fx.Node, fx.Node | None] = {n: n for n in kept}

    def of(self, node: fx.Node) -> fx.Node | None:
        """Return what a node would be; None for zero."""
        if node not in self._found:
            self._found[node] = self._written(node)
        return self._found[node]

    def _written(self, node: fx.Node) -> fx.Node | None:
        if node.op == "placeholder" or d.is_map(node):
            return None
        given = {n: self.of(n) for n in d.operands(node)}
        if all(n is None for n in given.values()):
            return None
        if d.is_call(node, SHIFT):  # what is added stands with the inputs
            return given[d.input_node(node)]
        if all(new is n for n, new in given.items()):
            return node
        if d.is_call(node, d.CAT):
            return self._joined(Cat.of(node), given)
        if d.is_call(node, d.ADD, d.SUB):
            first, second = (given[n] for n in (d.input_node(node), d.input_node(node, 1)))
            if second is None:
                return first
            if first is None:
                return second if d.is_call(node, d.ADD) else self._b.scale(second, -1.0)
        arguments = fx.node.map_arg(node.args, lambda n: given.get(n, n))
        return self._b.call(node.target, *arguments)

    def _joined(self, view: Cat, given: dict[fx.Node, fx.Node | None]) -> fx.Node:
        """Put zeros, made of a part that is not, where a part is."""
        live = next(n for n in given.values() if n is not None)
        parts = []
        for part in view.parts:
            new = given[part]
            if new is None:
                size = d.shape_of(part)[view.dim]
                first = self._b.index_select(live, view.dim, torch.zeros(size, dtype=torch.int64))
                new = self._b.scale(first, 0.0)
            parts.append(new)
        return self._b.cat(parts, view.dim)

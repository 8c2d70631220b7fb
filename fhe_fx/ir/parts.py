"""Affine graphs as sums of parts: what each source makes of its own."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import SHIFT
from fhe_fx.ir.views import Cat

__all__ = ["without_others"]


def without_others(b: Builder, node: fx.Node, kept: Collection[fx.Node]) -> fx.Node | None:
    """Write an affine node as it is where all its sources but some are zero.

    Args:
        b: writes it.
        node: affine.
        kept: the sources that stay.

    Returns:
        Its linear part, without the constants that are added on the way; None for zero.
    """
    return _Alone(b, set(kept)).of(node)


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
                new = self._b.zeros(live, view.dim, d.shape_of(part)[view.dim])
            parts.append(new)
        return self._b.cat(parts, view.dim)

"""Affine chains: what leads to a node by affine operators alone, and the one product that it is."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.ir.build import Builder, compact
from fhe_fx.ir.ops import LINEAR, PUT_PAIRS, SCALE, SHIFT, TAKE_PAIRS
from fhe_fx.ir.views import Sum

__all__ = ["AffineChain"]

_STEPS = d.AFFINE - {PUT_PAIRS, TAKE_PAIRS}
_MIXED = -1
"""Instead of a row's number: the element depends on several rows."""
_NONE = -2
"""Instead of a row's number: the element depends on none."""
_NO_WEIGHT = 1e-9
"""Part of the largest weight that is float rounding."""
_ALIKE = 1e-6
"""Part of the largest weight by which float rounding tells weights apart that are the same."""
MAX_WEIGHTS = 1 << 26
"""No larger product is composed: rows with weights of their own take memory."""


@dataclass(frozen=True)
class AffineChain:
    """What makes a node by affine operators."""

    nodes: tuple[fx.Node, ...]
    """In order; the node itself is the last."""
    sources: tuple[fx.Node, ...]
    """The encrypted nodes that they read and that are not among them."""
    zeros: tuple[fx.Node, ...] = ()
    """Others that they read, taken to be zero."""

    @staticmethod
    def of(node: fx.Node, *, to_products: bool = False) -> AffineChain:
        """Walk up from a node to what is not affine.

        Args:
            node: affine.
            to_products: no farther than to what the first clear-weight products multiply.
        """
        nodes: dict[fx.Node, None] = {}
        sources: dict[fx.Node, None] = {}
        ends: set[fx.Node] = set()

        def visit(n: fx.Node) -> None:
            if n in nodes or n in sources:
                return
            if n in ends or not d.is_call(n, *_STEPS):
                sources[n] = None
                return
            for operand in d.operands(n):
                if to_products and d.is_call(n, LINEAR):
                    ends.add(operand)
                visit(operand)
            nodes[n] = None

        visit(node)
        if ends & nodes.keys():  # also read beside a product that was met later
            nodes.clear()
            sources.clear()
            visit(node)
        return AffineChain(tuple(nodes), tuple(sources))

    def of_source(self, source: fx.Node) -> AffineChain:
        """Return what is left of the chain where all other sources are zero."""
        zeros = tuple(s for s in self.sources if s is not source)
        return AffineChain(self.nodes, (source,), (*self.zeros, *zeros))

    def reason_against_one_product(self) -> str | None:
        """Say why the chain is not one clear-weight product of each row, or None if it is."""
        if len(self.sources) != 1:
            return f"it is made of {len(self.sources)} tensors"
        if not self._is_weighted():
            return "part of it is not multiplied by clear weights"
        return self.reason_against_rows()

    def reason_against_rows(self) -> str | None:
        """Say why the only source is not read row by row, or None if it is."""
        shape = d.shape_of(self.sources[0])
        rows = self._rows()
        if bool((rows == _MIXED).any()):
            return "it mixes rows"
        if bool((rows == _NONE).any()):
            return "part of it is zero"
        counts = torch.bincount(rows.reshape(-1))
        counts = counts[counts > 0]
        if bool((counts != counts[0]).any()):
            return "its rows are read unevenly"
        if (n_weights := shape[-1] * rows.numel()) > MAX_WEIGHTS:
            return f"the composed weights would be {n_weights:,} numbers"
        return None

    def as_one_product(self, b: Builder, *, shifts: bool = True) -> fx.Node:
        """Write the chain as one clear-weight product, moved into the shape of its last node.

        The weights of all rows are the same where the chain does the same with each; otherwise
        every row has its own.

        Args:
            b: writes it.
            shifts: add the constants of the chain, too.
        """
        source, rows = self.sources[0], self._rows()
        shape = tuple(rows.shape)
        weight, offset = self._coefficients()
        order = torch.argsort(rows.reshape(-1), stable=True)  # what each row makes, side by side
        read = torch.unique(rows)
        weight = weight[:, order].view(len(weight), len(read), -1).transpose(0, 1)
        x = b.index_select(b.view(source, (-1, d.shape_of(source)[-1])), 0, read)
        if len(read) == 1:
            product = _without_copies(b, x, weight[0])
        elif torch.allclose(weight, weight[:1].expand_as(weight), rtol=1e-6, atol=1e-9):
            product = b.linear(x, weight[0].float())
        else:
            product = b.linear(b.view(x, (len(read), 1, -1)), weight.float())
        shaped = _in_place(b, product, rows, order)
        if not shifts or bool((offset == 0).all()):
            return shaped
        return b.shift(shaped, compact(offset.view(shape)))

    def products_of(self, sources: Collection[fx.Node]) -> int:
        """Count the clear-weight products that depend on some of the sources."""
        reached = set(sources)
        for node in self.nodes:
            if not reached.isdisjoint(d.operands(node)):
                reached.add(node)
        return sum(d.is_call(n, LINEAR) for n in reached)

    def reason_against_products(self) -> str | None:
        """Say why the chain is not a product of each row, nor one of several; None if it is."""
        if self.reason_against_one_product() is None:
            return None
        if len(self.sources) != 1:
            return f"it is made of {len(self.sources)} tensors"
        n_weights = math.prod(d.shape_of(self.sources[0])) * math.prod(d.shape_of(self.nodes[-1]))
        if n_weights > MAX_WEIGHTS:
            return f"the composed weights would be {n_weights:,} numbers"
        return None

    def as_products(self, b: Builder, *, shifts: bool = True) -> fx.Node:
        """Write the chain as one product of each row, or of all rows that are read where they mix.

        Elements that depend on the same rows are made together: behind a causal attention, those of
        one position by a product of the positions up to it. Where other rows are weighed alike, as
        the heads of each position are, one product makes them all.

        Args:
            b: writes it.
            shifts: add the constants of the chain, too.
        """
        if self.reason_against_one_product() is None:
            return self.as_one_product(b, shifts=shifts)
        source, shape = self.sources[0], d.shape_of(self.nodes[-1])
        weight, offset = self._coefficients_of_rows()
        n_rows, n_channels, _ = weight.shape
        rows = b.view(source, (n_rows, n_channels))
        parts: list[fx.Node] = []
        places: list[Tensor] = []
        for alike, matrix in _patterns(weight):
            read = torch.cat([r for r, _ in alike])
            x = b.view(b.index_select(rows, 0, read), (len(alike), len(matrix)))
            parts.append(b.view(b.linear(x, matrix), (-1,)))
            places += [elements for _, elements in alike]
        if sum(map(len, places)) < offset.numel():  # the others are constant
            others = torch.ones(offset.numel(), dtype=torch.bool)
            for elements in places:
                others[elements] = False
            places.append(others.nonzero().flatten())
            parts.append(b.zeros(b.view(source, (-1,)), 0, len(places[-1])))
        product = b.index_select(b.cat(parts, 0), 0, torch.argsort(torch.cat(places)))
        shaped = b.view(product, shape)
        if not shifts or bool((offset == 0).all()):
            return shaped
        return b.shift(shaped, compact(offset.view(shape)))

    def _is_weighted(self) -> bool:
        """Say whether every way from a source leads through a clear-weight product."""
        inside = set(self.nodes)

        def is_weighted(n: fx.Node) -> bool:
            readers = [u for u in n.users if u in inside]
            return bool(readers) and all(
                d.is_call(u, LINEAR)
                or (d.is_call(u, *d.STRUCTURAL, SCALE, SHIFT) and is_weighted(u))
                for u in readers
            )

        return all(is_weighted(s) for s in self.sources)

    def _rows(self) -> Tensor:
        """Return the row of the only source that each element depends on, or `_MIXED`."""
        shape = d.shape_of(self.sources[0])
        number = torch.arange(math.prod(shape[:-1])).view(*shape[:-1], 1)
        found = {self.sources[0]: number.expand(shape)}
        found |= {n: torch.full(d.shape_of(n), _NONE) for n in self.zeros}
        for node in self.nodes:
            found[node] = _rows_of(node, [found[n] for n in d.operands(node)])
        return found[self.nodes[-1]]

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        """Return weights `[K, numel]` and constants `[numel]`, float64.

        A weight is what an element gains when channel k of its row grows by one. Rows do not mix,
        so channel k of all rows may grow together.
        """
        shape = d.shape_of(self.sources[0])
        unit = torch.eye(shape[-1], dtype=torch.float64)
        inputs = torch.cat([torch.zeros(1, shape[-1], dtype=torch.float64), unit])
        inputs = inputs.view(-1, *(1,) * (len(shape) - 1), shape[-1]).expand(-1, *shape)
        values = self._values(inputs)
        return values[1:] - values[0], values[0]

    def _coefficients_of_rows(self) -> tuple[Tensor, Tensor]:
        """Return weights `[rows, K, numel]`, float32, and constants `[numel]`, float64.

        A weight is what an element gains when one channel of one row grows by one.
        """
        shape = d.shape_of(self.sources[0])
        n_rows, n_channels = math.prod(shape[:-1]), shape[-1]
        offset = self._values(torch.zeros(1, *shape, dtype=torch.float64))[0]
        unit = torch.eye(n_channels, dtype=torch.float64)
        weights = []
        for row in range(n_rows):
            inputs = torch.zeros(n_channels, n_rows, n_channels, dtype=torch.float64)
            inputs[:, row] = unit
            weights.append((self._values(inputs.view(-1, *shape)) - offset).float())
        return torch.stack(weights), offset

    def _values(self, inputs: Tensor) -> Tensor:
        """Run the chain on values `[n, *shape]` of its only source: `[n, numel]`, float64."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {self.sources[0]: graph.placeholder("x")}
        copies |= {n: graph.placeholder(f"zero_{i}") for i, n in enumerate(self.zeros)}
        for n, copy in copies.items():
            copy.meta.update(n.meta)

        def copied(n: fx.Node) -> fx.Node:
            if n not in copies:  # a constant
                copies[n] = graph.node_copy(n)
            return copies[n]

        for node in self.nodes:
            copies[node] = graph.node_copy(node, copied)
        graph.output(copies[self.nodes[-1]])
        module = fx.GraphModule(d.owner(self.nodes[-1]), graph).double()
        with torch.no_grad():
            zeros = [
                torch.zeros((), dtype=torch.float64).expand(len(inputs), *d.shape_of(n))
                for n in self.zeros
            ]
            values: Tensor = _AlikeRows(module).run(inputs, *zeros).flatten(1)
        return values


def _patterns(weight: Tensor) -> list[tuple[list[tuple[Tensor, Tensor]], Tensor]]:
    """Group the elements by the rows that they depend on, and these groups by their weights.

    Args:
        weight: `[rows, K, numel]`.

    Returns:
        For each distinct matrix `[rows read * K, n]`, the rows and the `n` elements of every group
        that it makes. Elements that depend on no row are in none.
    """
    greatest = float(weight.abs().max())
    is_read = (weight.abs().amax(1) > _NO_WEIGHT * greatest).mT
    patterns, pattern_of = torch.unique(is_read, dim=0, return_inverse=True)
    found: list[tuple[list[tuple[Tensor, Tensor]], Tensor]] = []
    for number, pattern in enumerate(patterns):
        read, elements = (t.nonzero().flatten() for t in (pattern, pattern_of == number))
        if not len(read):
            continue
        matrix = weight[read][..., elements].flatten(0, 1)
        for alike, known in found:
            if known.shape == matrix.shape and torch.allclose(
                known, matrix, rtol=_ALIKE, atol=_ALIKE * greatest
            ):
                alike.append((read, elements))
                break
        else:
            found.append(([(read, elements)], matrix))
    return found


class _AlikeRows(BatchInterpreter):
    """Runs a graph on repeated rows, which stay views: a product with one matrix is made once."""

    def _call(self, n: fx.Node, args: list[Any]) -> Any:
        if not d.is_call(n, LINEAR) or args[1].dim() != 2:
            return super()._call(n, args)
        x = args[0]
        repeated = [i for i in range(1, x.dim() - 1) if x.stride(i) == 0]
        once = x
        for axis in repeated:
            once = once.narrow(axis, 0, 1)
        product: Tensor = super()._call(n, [once, args[1]])
        return product.expand(*x.shape[:-1], product.shape[-1])


def _without_copies(b: Builder, x: fx.Node, weight: Tensor) -> fx.Node:
    """Multiply by each distinct column once, and repeat what that makes."""
    mixture = torch.randn(len(weight), generator=torch.Generator().manual_seed(0)).double()
    mixed = mixture @ weight
    value, order = mixed.sort()
    is_new = value.diff(prepend=value[:1] - 1) > 1e-9 * mixture.norm() * weight.norm(dim=0).mean()
    if bool(is_new.all()):
        return b.linear(x, weight.float())
    which = torch.empty_like(order)
    which[order] = is_new.long().cumsum(0) - 1
    return b.index_select(b.linear(x, weight[:, order[is_new]].float()), -1, which)


def _in_place(b: Builder, product: fx.Node, rows: Tensor, order: Tensor) -> fx.Node:
    """Move what the rows made, side by side, to where `rows` says that it stands.

    Dimensions along which the row does not change are those of its elements; where the others
    count the rows, a permutation does it.
    """
    shape = tuple(rows.shape)
    along = [i for i in range(rows.dim()) if bool((rows != rows.narrow(i, 0, 1)).any())]
    across = [i for i in range(rows.dim()) if i not in along]
    sizes = [shape[i] for i in (*along, *across)]
    dims = [(*along, *across).index(i) for i in range(rows.dim())]
    counted = torch.argsort(order).view(shape)
    if torch.equal(torch.arange(rows.numel()).view(sizes).permute(dims), counted):
        return b.permute(b.view(product, sizes), dims)
    return b.view(b.index_select(b.view(product, (-1,)), 0, torch.argsort(order)), shape)


def _rows_of(node: fx.Node, inputs: list[Tensor]) -> Tensor:
    shape, first = d.shape_of(node), inputs[0]
    if d.is_call(node, *d.STRUCTURAL):
        return d.evaluate(node, *inputs)
    if d.is_call(node, d.ADD, d.SUB):
        second = inputs[-1]
        same = torch.where(first == second, first, _MIXED)
        return torch.where(first == _NONE, second, torch.where(second == _NONE, first, same))
    if d.is_call(node, d.SUM):
        return _common(first, tuple(Sum.of(node).dims)).reshape(shape)
    if d.is_call(node, LINEAR):
        return _common(first, (-1,)).expand(shape)
    return first.expand(shape)


def _common(rows: Tensor, dims: tuple[int, ...]) -> Tensor:
    greatest = rows.amax(dims, keepdim=True)
    least = torch.where(rows == _NONE, greatest, rows).amin(dims, keepdim=True)
    return torch.where(least == greatest, least, _MIXED)

"""Build only the pairs of rows and columns that are read: masked products never exist.

Exact. Gathered entries of a product of two encrypted matrices become products of gathered rows; a
scattered matrix times a matrix becomes a sum over each row's pairs. Where the rows sum to one (a
softmax) and share a live column, that column's value is subtracted from the others, so its own
products vanish: sum_j p_j v_j = v_0 + sum_j p_j (v_j - v_0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import PUT_PAIRS, SCALE, SHIFT, TAKE_PAIRS
from fhe_fx.ir.program import Program
from fhe_fx.ir.views import PutPairs, TakePairs
from fhe_fx.passes.base import Pass, register

__all__ = ["SinkPairs"]


@register
@dataclass(frozen=True)
class SinkPairs(Pass):
    """Move `take_pairs` before, and `put_pairs` behind, the matrix products they touch."""

    name: ClassVar[str] = "sink-pairs"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    gives: ClassVar[frozenset[str]] = frozenset({"no-pairs"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Rewrite until no pair operator is left."""
        changed = False
        for node in program.calls(d.MATMUL):
            if (parts := _scattered(d.input_node(node))) is not None:
                new = _sum_pairs(program.before(node, self), d.input_node(node, 1), *parts)
                if new is None:
                    program.note(self, node, "rows with several pairs also have constant entries")
                    continue
                program.replace(node, new)
                changed = True
        program.clean()
        while nodes := program.calls(TAKE_PAIRS):
            for node in nodes:
                program.replace(node, _take(program.before(node, self), node))
            program.clean()
            changed = True
        for node in program.calls(PUT_PAIRS):
            program.replace(node, _put(program.before(node, self), node))
            changed = True
        return changed


def _take(b: Builder, node: fx.Node) -> fx.Node:
    pairs = TakePairs.of(node)
    x, rows, columns = pairs.x, pairs.rows, pairs.columns

    def pick(n: fx.Node) -> fx.Node:
        return b.take_pairs(n, rows, columns)

    def pick_constant(n: fx.Node) -> Tensor:
        c = d.constant(n)
        if c.numel() == 1:
            return c.reshape(())  # [1, 1, 1] would not broadcast to fewer dimensions
        return c.expand(d.shape_of(x))[..., rows, columns]

    if d.is_call(x, SCALE):
        return b.scale(pick(d.input_node(x)), pick_constant(d.input_node(x, 1)))
    if d.is_call(x, SHIFT):
        return b.shift(pick(d.input_node(x)), pick_constant(d.input_node(x, 1)))
    if d.is_call(x, d.ADD, d.SUB, d.MUL):
        left, right = (pick(cast(fx.Node, a)) for a in x.args)
        return b.call(x.target, left, right)
    if d.is_call(x, d.MATMUL):
        left = b.index_select(d.input_node(x), -2, rows)
        right = b.index_select(b.transpose(d.input_node(x, 1), -2, -1), -2, columns)
        return b.sum(b.mul(left, right), [-1])
    *lead, n_rows, n_columns = d.shape_of(x)
    flat = b.view(x, (*lead, n_rows * n_columns))
    return b.index_select(flat, -1, rows * n_columns + columns)


def _put(b: Builder, node: fx.Node) -> fx.Node:
    """Scatter by a selection, with an encrypted zero for the entries that no pair fills."""
    pairs = PutPairs.of(node)
    x, n_rows, n_columns = pairs.x, pairs.n_rows, pairs.n_columns
    *lead, n = d.shape_of(x)
    source = torch.full((n_rows * n_columns,), n)
    source[pairs.rows * n_columns + pairs.columns] = torch.arange(n)
    if n < n_rows * n_columns:
        x = b.cat([x, b.zeros(x, -1, 1)], -1)
    return b.view(b.index_select(x, -1, source), (*lead, n_rows, n_columns))


@dataclass(frozen=True)
class _Scattered:
    """A matrix of scattered pairs plus a constant matrix."""

    values: fx.Node
    rows: Tensor
    columns: Tensor
    constant: Tensor
    """`[n_rows, n_columns]`."""
    rows_sum_to_one: bool


def _scattered(x: fx.Node) -> tuple[_Scattered] | None:
    constant = None
    is_stochastic = bool(x.meta.get("rows_sum_to_one"))
    if d.is_call(x, SHIFT):
        constant = d.constant(d.input_node(x, 1))
        x = d.input_node(x)
    if not d.is_call(x, PUT_PAIRS):
        return None
    pairs = PutPairs.of(x)
    if constant is None:
        constant = torch.zeros(pairs.n_rows, pairs.n_columns)
    if constant.shape != (pairs.n_rows, pairs.n_columns):
        return None
    return (_Scattered(pairs.x, pairs.rows, pairs.columns, constant, is_stochastic),)


def _sum_pairs(b: Builder, v: fx.Node, m: _Scattered) -> fx.Node | None:
    """Return the scattered matrix times v, built from the pairs alone."""
    n_rows = len(m.constant)
    in_pairs = torch.isin(torch.arange(n_rows), m.rows)
    is_one_hot = ((m.constant == 1).sum(-1) == 1) & ((m.constant != 0).sum(-1) == 1)
    if not bool((is_one_hot ^ in_pairs).all()):
        return None
    live = m.constant != 0
    live[m.rows, m.columns] = True
    common = live.all(0).nonzero().flatten()
    if m.rows_sum_to_one and len(common):
        return _sum_around(b, v, m, int(common[0]))
    sums = _row_sums(b, m.values, b.index_select(v, -2, m.columns), m.rows)
    alone = (~in_pairs).nonzero().flatten()
    if not len(alone):
        return sums
    single = b.index_select(v, -2, m.constant[alone].argmax(-1))
    return _merge_rows(b, sums, single, in_pairs)


def _sum_around(b: Builder, v: fx.Node, m: _Scattered, reference: int) -> fx.Node:
    n_rows, n_columns = m.constant.shape
    base = b.index_select(v, -2, torch.tensor([reference]))
    others = torch.tensor([c for c in range(n_columns) if c != reference])
    spread = b.sub(b.index_select(v, -2, others), base)
    keep = (m.columns != reference).nonzero().flatten()
    position = torch.searchsorted(others, m.columns[keep])
    sums = _row_sums(
        b, b.index_select(m.values, -1, keep), b.index_select(spread, -2, position), m.rows[keep]
    )
    filled = b.add(sums, base)
    is_filled = torch.isin(torch.arange(n_rows), m.rows[keep])
    if bool(is_filled.all()):
        return filled
    *lead, _, width = d.shape_of(base)
    alone = b.expand(base, (*lead, int((~is_filled).sum()), width))  # these weigh it by one
    return _merge_rows(b, filled, alone, is_filled)


def _row_sums(b: Builder, weights: fx.Node, values: fx.Node, rows: Tensor) -> fx.Node:
    """Sum weights times values over the pairs of each row."""
    products = b.mul(b.view(weights, (*d.shape_of(weights), 1)), values)
    parts = [
        b.sum(b.index_select(products, -2, (rows == r).nonzero().flatten()), [-2], True)
        for r in torch.unique(rows)
    ]
    return b.cat(parts, -2)


def _merge_rows(b: Builder, first: fx.Node, second: fx.Node, is_first: Tensor) -> fx.Node:
    order = torch.empty(len(is_first), dtype=torch.int64)
    order[is_first] = torch.arange(int(is_first.sum()))
    order[~is_first] = torch.arange(int((~is_first).sum())) + int(is_first.sum())
    return b.index_select(b.cat([first, second], -2), -2, order)

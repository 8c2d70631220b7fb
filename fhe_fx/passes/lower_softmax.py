"""Write a softmax as a log-sum-exp over its live entries, then one exponential each.

Exact. lse(a, b) = a + softplus(b - a) folds a row in a balanced tree, one look-up per entry but
one; p = exp(s - lse) is one more. No division, no maximum, no sum of exponentials with a huge
dynamic range. Entries that a constant mask hides are not even gathered, and a row with a single
live entry is the constant 1; where all rows are, as of a single token, they weigh as constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import MASKED_SOFTMAX
from fhe_fx.ir.program import Program
from fhe_fx.ir.views import MaskedSoftmax
from fhe_fx.passes.base import Pass, register

__all__ = ["LowerSoftmax"]

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class LowerSoftmax(Pass):
    """Replace `masked_softmax` by gathered pairs, a log-sum-exp tree and exponentials."""

    name: ClassVar[str] = "lower-softmax"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    gives: ClassVar[frozenset[str]] = frozenset({"no-softmax"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Rewrite each softmax."""
        nodes = program.calls(MASKED_SOFTMAX)
        for node in nodes:
            if (weights := _constant_weights(node)) is not None:
                self._weigh(program, node, weights)
            if node.users:
                program.replace(node, self._rewrite(program.before(node, self), node))
        return bool(nodes)

    def _weigh(self, program: Program, node: fx.Node, weights: Tensor) -> None:
        """Multiply what a softmax weighs by the constants that it is."""
        common = _common_mask(weights)
        turned = (weights if common is None else common).transpose(-2, -1).clone()
        is_identity = torch.equal(turned, torch.eye(turned.shape[-1]))
        for user in list(node.users):
            if not (d.is_call(user, d.MATMUL) and user.args[0] is node):
                continue
            b, weighed = program.before(user, self), d.input_node(user, 1)
            if not is_identity:
                turned_back = b.linear(b.transpose(weighed, -2, -1), turned)
                weighed = b.transpose(turned_back, -2, -1)
            program.replace(user, weighed)

    def _rewrite(self, b: Builder, node: fx.Node) -> fx.Node:
        shape = d.shape_of(node)
        softmax = MaskedSoftmax.of(node)
        live = softmax.live.expand(shape)
        x, matrix = softmax.x, _common_mask(live)
        if matrix is None:  # rows of different batch entries have different masks
            x, matrix = b.view(x, (-1, shape[-1])), live.reshape(-1, shape[-1])
        elif len(shape) == 1:
            x = b.view(x, (1, -1))
        alone = matrix & (matrix.sum(-1, keepdim=True) == 1)
        rows, columns = (matrix & ~alone).nonzero(as_tuple=True)
        if len(rows) == 0:
            dense = b.shift(b.scale(x, 0.0), 0.0 if softmax.is_log else alone.float())
            return b.view(dense, shape)
        scores = b.take_pairs(x, rows, columns)
        total = self._log_sum_exp(b, scores, rows)
        _, position = torch.unique(rows, return_inverse=True)
        result = b.sub(scores, b.index_select(total, -1, position))
        if not softmax.is_log:
            result = b.apply(result, aten.exp.default)
        dense = b.put_pairs(result, rows, columns, *matrix.shape)
        dense.meta["rows_sum_to_one"] = not softmax.is_log and bool(matrix.any(-1).all())
        if bool(alone.any()) and not softmax.is_log:
            dense = b.shift(dense, alone.float())
            dense.meta["rows_sum_to_one"] = bool(matrix.any(-1).all())
        return b.view(dense, shape)

    def _log_sum_exp(self, b: Builder, x: fx.Node, rows: Tensor) -> fx.Node:
        """Fold the entries of each row in a balanced tree; one entry a row remains, in order."""
        lists = [(rows == r).nonzero().flatten().tolist() for r in torch.unique(rows)]
        while any(len(entries) > 1 for entries in lists):
            pairs = [(e[i], e[i + 1]) for e in lists for i in range(0, len(e) - 1, 2)]
            odd = [e[-1] for e in lists if len(e) % 2]
            left = b.index_select(x, -1, torch.tensor([p[0] for p in pairs]))
            right = b.index_select(x, -1, torch.tensor([p[1] for p in pairs]))
            folded = b.add(left, b.apply(b.sub(right, left), aten.softplus.default))
            place = {e: len(pairs) + i for i, e in enumerate(odd)}
            place |= {p[0]: i for i, p in enumerate(pairs)}
            if odd:
                folded = b.cat([folded, b.index_select(x, -1, torch.tensor(odd))], -1)
            lists = [[place[e] for e in entries if e in place] for entries in lists]
            x = folded
        return b.index_select(x, -1, torch.tensor([entries[0] for entries in lists]))


def _constant_weights(node: fx.Node) -> Tensor | None:
    """Return a softmax that no score can change, of rows with one live entry at most; else None."""
    softmax = MaskedSoftmax.of(node)
    live = softmax.live.expand(d.shape_of(node))
    is_constant = not softmax.is_log and not bool((live.sum(-1) > 1).any())
    return live.float() if is_constant else None


def _common_mask(live: Tensor) -> Tensor | None:
    """Return the mask of the last two dimensions if all batch entries share it."""
    if live.dim() == 1:
        return live.unsqueeze(0)
    flat = live.reshape(-1, *live.shape[-2:])
    return flat[0].clone() if bool((flat == flat[:1]).all()) else None

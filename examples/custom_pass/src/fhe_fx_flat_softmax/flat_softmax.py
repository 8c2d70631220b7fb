"""Write a softmax with one sum of exponentials for a row, in place of a tree of pairs.

Exact. With a constant c for each row, p_j = exp(s_j - c - log sum_k exp(s_k - c)): for n live keys
2 n + 1 look-ups, two more than the tree of `lower-softmax`. At most three stand one behind
the other, where the tree has 1 + log2(n). In integers the sum has to hold all the dynamic range of
the exponentials at once, which the tree avoids: c is the mean of the row's log-sum-exp on the
calibration samples, so that the sum stays around one. Runs before `lower-softmax`, which does what
is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import Builder, Program
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import MASKED_SOFTMAX
from fhe_fx.ir.views import MaskedSoftmax
from fhe_fx.passes import Pass, register

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class FlatSoftmax(Pass):
    """Replace each `masked_softmax` whose heads have one mask."""

    name: ClassVar[str] = "flat-softmax"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    max_live: int = 64
    """Rows of more live keys are left to `lower-softmax`."""

    def run(self, program: Program) -> bool:
        """Rewrite each softmax, or note why not."""
        changed = False
        for node in program.calls(MASKED_SOFTMAX):
            softmax = MaskedSoftmax.of(node)
            live = softmax.live.expand(d.shape_of(node))
            if (reason := self._declined(softmax, live)) is not None:
                program.note(self, node, reason)
                continue
            constants = _mean_log_sum_exp(program, softmax.x, live)
            mask = live.reshape(-1, *live.shape[-2:])[0]
            program.replace(node, _flat(program.before(node, self), softmax.x, mask, constants))
            changed = True
        return changed

    def _declined(self, softmax: MaskedSoftmax, live: Tensor) -> str | None:
        if softmax.is_log:
            return "it is a log-softmax"
        if live.dim() < 2 or not bool((live == live.reshape(-1, *live.shape[-2:])[0]).all()):
            return "its heads have different masks"
        counts = live.sum(-1)
        if not bool(counts.all()) or bool((counts == 1).all()):
            return "a row has no live key, or no row has two"
        most = int(counts.max())
        return f"{most} live keys, max_live={self.max_live}" if most > self.max_live else None


def _mean_log_sum_exp(program: Program, scores: fx.Node, live: Tensor) -> Tensor:
    """Return the mean over the samples of each row's log-sum-exp, `[..., rows]`."""
    values = program.values(program.samples, [scores.name])[scores.name]
    return values.masked_fill(~live, -torch.inf).logsumexp(-1).mean(0)


def _flat(b: Builder, x: fx.Node, mask: Tensor, constants: Tensor) -> fx.Node:
    """Write the softmax of the rows with two live keys or more; a key alone has weight 1."""
    alone = mask & (mask.sum(-1, keepdim=True) == 1)
    rows, columns = (mask & ~alone).nonzero(as_tuple=True)
    different, place = torch.unique(rows, return_inverse=True)
    centred = b.shift(b.take_pairs(x, rows, columns), -constants[..., rows])
    powers = b.view(b.apply(centred, aten.exp.default), (*d.shape_of(centred)[:-1], 1, len(rows)))
    membership = (place[:, None] == torch.arange(len(different))).float()
    sums = b.view(b.linear(powers, membership), (*d.shape_of(centred)[:-1], len(different)))
    total = b.index_select(b.apply(sums, aten.log.default), -1, place)
    weights = b.apply(b.sub(centred, total), aten.exp.default)
    dense = b.put_pairs(weights, rows, columns, *mask.shape)
    dense.meta["rows_sum_to_one"] = not bool(alone.any())
    if bool(alone.any()):
        dense = b.shift(dense, alone.float())
        dense.meta["rows_sum_to_one"] = True
    return dense

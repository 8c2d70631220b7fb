"""Replace softmax by one function of each centred score: a ReLU, its square, or an exponential.

Not exact. For n live keys with scores s, p_j = a_j f(s_j - mean(s) - b_j) for all but the first,
which takes the rest, 1 - sum p_j. In attention, where nobody looks up the weight of the first key,
that is n - 1 look-ups a row in place of 2 n - 2, and all of them side by side. The mean and the
rest are affine, so free. The constants a and b of each head, row and key are fitted to the softmax
of the calibration samples by least squares.

Attention with a ReLU in place of softmax is from Wortsman et al. 2023, "Replacing softmax with ReLU
in Vision Transformers" (arXiv 2309.08586), with a = 1/n and b = 0 and trained so; its square, as a
polynomial that secure computation can afford, from Li et al. 2023, "MPCFormer" (arXiv 2211.01452),
with a division. Runs before `lower-softmax`.
"""

from __future__ import annotations

from collections.abc import Callable
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
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "square": lambda x: torch.relu(x).square(),
    "exp": lambda x: x.clamp_max(0).exp(),
}
"""What a score becomes. A table look-up costs the same for each."""
_PLACES = 48
"""Values of b that are tried, from the least to the greatest score."""


@register
@dataclass(frozen=True)
class ReluSoftmax(Pass):
    """Replace each `masked_softmax` whose rows share their first live key."""

    name: ClassVar[str] = "relu-softmax"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})
    is_exact: ClassVar[bool] = False

    shape: str = "relu"
    """One of `SHAPES`."""

    def run(self, program: Program) -> bool:
        """Rewrite each softmax, or note why not.

        Raises:
            ValueError: if there is no such shape.
        """
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} is not one of {', '.join(SHAPES)}")
        changed = False
        for node in program.calls(MASKED_SOFTMAX):
            softmax = MaskedSoftmax.of(node)
            live = softmax.live.expand(d.shape_of(node))
            if (reason := _declined(softmax, live)) is not None:
                program.note(self, node, reason)
                continue
            mask = live.reshape(-1, *live.shape[-2:])[0]
            new = self._written(program, program.before(node, self), softmax.x, mask)
            program.replace(node, new)
            changed = True
        return changed

    def _written(self, program: Program, b: Builder, x: fx.Node, mask: Tensor) -> fx.Node:
        first = int(mask.any(0).nonzero()[0])
        alone = mask.sum(-1) == 1  # the first key has all the weight
        rows, columns = (mask & ~alone[:, None]).nonzero(as_tuple=True)
        others = columns != first
        different, place = torch.unique(rows, return_inverse=True)
        own_row = (place[:, None] == torch.arange(len(different))).float()  # [pairs, rows]
        counts = own_row.sum(0)[place]
        scores = b.take_pairs(x, rows, columns)
        # s - mean(s) is affine: (n s - sum(s)) / n, where the matrix is of whole numbers.
        matrix = torch.diag(counts) - own_row @ own_row.T
        a, offset = self._fit(program, x, (rows, columns), matrix / counts, own_row, others)
        centred = b.view(_times(b, scores, matrix[:, others]), a.shape)
        weights = self._map(b, b.scale(centred, 1 / counts[others]), a, offset)
        rest = b.shift(_times(b, weights, -own_row[others]), 1.0)
        order = torch.cat([rows[others], different])
        places = torch.cat([columns[others], torch.full((len(different),), first)])
        dense = b.put_pairs(b.cat([weights, rest], -1), order, places, *mask.shape)
        if bool(alone.any()):
            dense = b.shift(dense, (mask & alone[:, None]).float())
        dense.meta["rows_sum_to_one"] = True
        return dense

    def _map(self, b: Builder, x: fx.Node, a: Tensor, offset: Tensor) -> fx.Node:
        x = b.shift(x, -offset)
        if self.shape == "exp":  # limited as its table is, which ends where scores do
            return b.scale(b.apply(b.apply(x, aten.clamp_max.default, 0.0), aten.exp.default), a)
        x = b.apply(x, aten.relu.default)
        if self.shape == "square":
            x = b.apply(x, aten.pow.Tensor_Scalar, 2)
        return b.scale(x, a)

    def _fit(
        self,
        program: Program,
        x: fx.Node,
        pairs: tuple[Tensor, Tensor],
        centring: Tensor,
        own_row: Tensor,
        others: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return factor and offset of each pair but the first key's, `[..., pairs]`."""
        scores = program.values(program.samples, [x.name])[x.name][(..., *pairs)].double()
        largest = scores.amax(-1, keepdim=True)
        powers = (scores - largest).exp()
        sums = powers @ own_row.double()
        wanted = (powers / (sums @ own_row.double().T).clamp_min(1e-300))[..., others]
        centred = (scores @ centring.double())[..., others]
        low, high = centred.amin(0), centred.amax(0)
        best = torch.full(low.shape, torch.inf, dtype=torch.float64)
        a, offset = torch.zeros_like(best), torch.zeros_like(best)
        for place in torch.linspace(-1, 1, _PLACES, dtype=torch.float64):
            tried = low + place * (high - low)
            found = SHAPES[self.shape](centred - tried)
            factor = (found * wanted).sum(0) / found.square().sum(0).clamp_min(1e-30)
            error = (factor * found - wanted).square().sum(0)
            is_better = error < best
            best = torch.where(is_better, error, best)
            a, offset = torch.where(is_better, factor, a), torch.where(is_better, tried, offset)
        return a.float(), offset.float()


def _times(b: Builder, x: fx.Node, matrix: Tensor) -> fx.Node:
    """Multiply the last dimension by a constant matrix."""
    *lead, n = d.shape_of(x)
    return b.view(b.linear(b.view(x, (*lead, 1, n)), matrix), (*lead, matrix.shape[1]))


def _declined(softmax: MaskedSoftmax, live: Tensor) -> str | None:
    if softmax.is_log:
        return "it is a log-softmax"
    if live.dim() < 2 or not bool((live == live.reshape(-1, *live.shape[-2:])[0]).all()):
        return "its heads have different masks"
    mask = live.reshape(-1, *live.shape[-2:])[0]
    if not bool(mask.any()) or not bool(mask[:, mask.any(0).nonzero()[0]].all()):
        return "its rows have no key in common with the first"
    return "no row has two live keys" if bool((mask.sum(-1) == 1).all()) else None

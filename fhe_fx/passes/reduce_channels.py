"""Let fewer channels through a product of encrypted matrices that clear weights read.

Not exact: results change by at most a part (`most`) of the error that they may have. In x V W,
where look-ups make x and clear weights V and W stand on both sides of its sum, any basis may be
chosen for the channels between them: x V W = x (V A) (B^T W) with A B^T = 1. Channels are left out
only in what x deviates from its mean m over the samples,

    x V W ~ (x - m) V A B^T W + m V W = x (V A) (B^T W) + m V (1 - A B^T) W,

for the rest is affine and costs no look-up. A weight of attention is much the same for every text,
so that few channels do where few would not do for the values themselves. Those are kept in which
the deviations move the results most, by the derivatives on the samples, of some heads more, of
others fewer, and rotated until all vary alike. As many are kept as make the circuit cheapest: with
fewer look-ups these have to be finer, because both errors add up to the one that is allowed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.ir.chains import MAX_WEIGHTS, AffineChain
from fhe_fx.ir.ops import LINEAR, PUT_PAIRS, TAKE_PAIRS
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.bases import Bases, bases_of
from fhe_fx.quant.rank import first, look_ups_of_matmul, relative_error
from fhe_fx.quant.sensitivity import sensitivities

__all__ = ["ReduceChannels"]

_MOVES = d.STRUCTURAL - {d.CAT, PUT_PAIRS, TAKE_PAIRS}


@register
@dataclass(frozen=True)
class ReduceChannels(Pass):
    """Rewrite each `matmul` whose second operand weights make, and whose result weights read."""

    name: ClassVar[str] = "reduce-channels"
    requires: ClassVar[frozenset[str]] = frozenset({"calibrated", "normal"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})
    is_exact: ClassVar[bool] = False

    usual_error: float = 0.6
    """Error of the results that is taken to be allowed in all where the options give no
    `max_error`, in parts of 2**-n_bits of their deviation."""
    most: float = 0.5
    """Part of the squared error allowed that may be spent here."""
    exchange: float = 2.0
    """By how many per cent of itself the squared error of look-ups falls for a per cent of cost."""
    n_groups: int = 3
    """Heads that keep different numbers of channels are multiplied apart; in so many groups."""

    def run(self, program: Program) -> bool:
        """Rewrite one product after the other."""
        changed = False
        for node in program.calls(d.MATMUL):
            if (reason := _reason_against(node)) is not None:
                program.note(self, node, f"no basis for the channels of its result: {reason}")
                continue
            changed |= self._rewrite(program, node)
        return changed

    def _rewrite(self, program: Program, node: fx.Node) -> bool:
        x, y = d.input_node(node), d.input_node(node, 1)
        mean = program.observed[x.name].mean(0)
        moments = _Moments.of(program, node, mean)
        error = _error(program, node, moments.bases(), mean)
        groups = self._groups(program, node, moments.bases(), error)
        if groups is None:
            return False
        program.left_out += error(groups) ** 2
        b = program.before(node, self)
        parts = []
        for heads, rank in groups:
            rows = b.index_select(y, -3, heads)
            if rank:
                left, right = moments.bases(heads).equalized(rank, program.options.seed)
                narrow = b.matmul(b.index_select(x, -3, heads), b.linear(rows, left.float()))
                parts.append(b.linear(narrow, right.mT.float()))
            else:
                shape = (*d.shape_of(node)[:-3], len(heads), *d.shape_of(node)[-2:])
                parts.append(b.expand(b.zeros(rows, -2, 1), shape))
        order = torch.argsort(torch.cat([heads for heads, _ in groups]))
        new = b.index_select(b.cat(parts, -3), -3, order)
        kept = _projector(moments.bases(), groups)
        lost = (torch.eye(kept.shape[-1]) - kept).float()
        rows = b.linear(b.transpose(b.linear(y, lost), -2, -1), mean.mT)
        program.replace(node, b.add(new, b.transpose(rows, -2, -1)))
        return True

    def _groups(
        self, program: Program, node: fx.Node, bases: Bases, error: Callable[[_Groups], float]
    ) -> _Groups | None:
        """Return the ranks at which the circuit costs least, if results err as is allowed.

        None where that is with all channels.
        """
        allowed = program.options.max_error
        if allowed is None:
            allowed = self.usual_error * 2.0**-program.options.n_bits
        variance = allowed**2 - program.left_out
        *lead, _, channels = d.shape_of(node)
        each = look_ups_of_matmul(node) / d.shape_of(node.args[0])[-1] / math.prod(lead)  # type: ignore[arg-type]
        others = sum(look_ups_of_matmul(n) for n in program.calls(d.MATMUL) if n is not node)
        all_of_them = math.prod(lead) * channels
        strength = bases.strength.reshape(-1, channels)
        if math.prod(lead[:-1]) > 1:
            strength = strength.sum(0, keepdim=True)  # heads are the last of these dimensions

        def groups(step: int) -> _Groups:
            ranks = torch.zeros(len(strength), dtype=torch.int64)
            most = strength.reshape(-1).argsort(descending=True)[: step * len(strength)]
            ranks += torch.bincount(most // channels, minlength=len(strength))
            return _grouped(ranks.expand(lead[-1]), self.n_groups)

        def price(step: int) -> float:
            if step == channels:
                return float(others + all_of_them * each)
            found = groups(step)
            spent = error(found) ** 2
            if variance <= 0 or spent > self.most * variance:
                return math.inf
            kept = sum(len(heads) * rank for heads, rank in found) * math.prod(lead[:-1])
            return (others + kept * each) * math.pow(1.0 - spent / variance, -1.0 / self.exchange)

        least = first(range(channels + 1), lambda s: price(s) < math.inf)
        # It falls to its minimum and rises from there: errors fall faster where they are large.
        best = first(
            range(least, channels + 1), lambda s: s == channels or price(s + 1) >= price(s)
        )
        found = groups(best)
        return found if any(rank < channels for _, rank in found) else None


_Groups = tuple[tuple[Tensor, int], ...]
"""Heads, numbers along the dimension in front of the matrices, and how many channels they keep."""


def _grouped(ranks: Tensor, n_groups: int) -> _Groups:
    """Put heads of like ranks together; all of a group keep as many channels as the most do."""
    order = torch.argsort(ranks, descending=True, stable=True)
    sorted_ranks, n = ranks[order].tolist(), len(ranks)
    starts = range(1, n)

    def kept(cuts: Sequence[int]) -> int:
        ends = [0, *cuts, n]
        return sum((j - i) * sorted_ranks[i] for i, j in itertools.pairwise(ends))

    ways = (c for k in range(min(n_groups, n)) for c in itertools.combinations(starts, k))
    cuts = [0, *min(ways, key=lambda c: (kept(c), len(c))), n]
    return tuple((order[i:j].sort().values, sorted_ranks[i]) for i, j in itertools.pairwise(cuts))


def _projector(bases: Bases, groups: _Groups) -> Tensor:
    """Return what the deviations of each head are multiplied by, `[*lead, K, K]`, float64."""
    ranks = torch.zeros(bases.left.shape[:-2], dtype=torch.int64)
    for heads, rank in groups:
        ranks[..., heads] = rank
    is_kept = torch.arange(bases.left.shape[-1]) < ranks.unsqueeze(-1)
    return bases.left * is_kept.unsqueeze(-2) @ bases.right.mT


def _reason_against(node: fx.Node) -> str | None:
    """Say why no weights carry a basis from before a product to behind it, or None."""
    y = AffineChain.of(d.input_node(node, 1))
    if (reason := y.reason_against_one_product()) is not None:
        return reason
    if len(d.shape_of(node)) < 3:
        return "it is one matrix, not one for each head"
    readers = _readers(node)
    if any(not d.is_call(r, LINEAR) for r in readers):
        return "more than clear weights read it"
    n_weights = math.prod(d.shape_of(y.sources[0])) * max(math.prod(d.shape_of(r)) for r in readers)
    if n_weights > MAX_WEIGHTS:
        return f"the composed weights would be {n_weights:,} numbers"
    return None


def _readers(node: fx.Node) -> set[fx.Node]:
    """Return what reads the elements of a node, moved or not."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= _readers(user) if d.is_call(user, *_MOVES) else {user}
    return found


@dataclass(frozen=True)
class _Moments:
    """Mean outer products of the channels between two clear weights, `[*lead, K, K]`, float64."""

    values: Tensor
    """Of the rows of y, each weighed by how far what multiplies it deviates from its mean."""
    results: Tensor
    """Of the derivatives of the results."""

    @staticmethod
    def of(program: Program, node: fx.Node, mean: Tensor) -> _Moments:
        x, y = (program.observed[o.name].double() for o in d.operands(node))
        gradient = sensitivities(program, program.samples, draws=1, nodes=[node])[node.name][0]
        weights = (x - mean).square().sum(-2).unsqueeze(-1)  # over the rows of x
        y = y.expand(len(y), *d.shape_of(node)[:-2], *y.shape[-2:])
        g = gradient.double()
        return _Moments(((y * weights).mT @ y).mean(0), (g.mT @ g).mean(0))

    def bases(self, heads: Tensor | None = None) -> Bases:
        """Return the bases in which deviations of x, times y, move the results by few channels."""
        if heads is None:
            return bases_of(self.values, self.results)
        return bases_of(*(m.index_select(-3, heads) for m in (self.values, self.results)))


def _error(
    program: Program, node: fx.Node, bases: Bases, mean: Tensor
) -> Callable[[_Groups], float]:
    """Return a function from groups to the error of the results, in parts of their deviation."""
    exact = [program.observed[n.name] for n in program.results]
    inputs = program.stacked(program.samples)
    known: dict[tuple[float, ...], float] = {}

    def error(groups: _Groups) -> float:
        projector = _projector(bases, groups).float()
        ranks = tuple(projector.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(-1).tolist())
        if ranks not in known:
            with torch.no_grad():
                found = _Reduced(program.module, node, projector, mean).run(*inputs)
            known[ranks] = relative_error(exact, found)
        return known[ranks]

    return error


class _Reduced(BatchInterpreter):
    """Runs a graph in which the deviations of a product's first operand pass few channels."""

    def __init__(
        self, module: fx.GraphModule, node: fx.Node, projector: Tensor, mean: Tensor
    ) -> None:
        super().__init__(module)
        self.node, self.projector, self.mean = node, projector, mean

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n is self.node:
            affine = self.mean @ self.env[d.input_node(n, 1)]
            value = (value - affine) @ self.projector + affine
        return value

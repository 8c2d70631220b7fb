"""Let fewer channels through a product of encrypted matrices that clear weights read.

Not exact: results change by at most a part (`most`) of the error that they may have. In x V W,
where look-ups make x and clear weights V and W stand on both sides of its sum, any basis may be
chosen for the channels between them: x V W = x (V A) (B^T W) with A B^T = 1. Channels are left out
only in what x deviates from its mean m over the samples,

    x V W ~ (x - m) V A B^T W + m V W = x (V A) (B^T W) + m V (1 - A B^T) W,

for the rest is affine and costs no look-up. A weight of attention is much the same for every text,
so that few channels do where few would not do for the values themselves. Those are kept in which
the deviations move the results most, by the derivatives on the samples, and rotated until all vary
alike. As many are kept as make the circuit cheapest: with fewer look-ups these have to be finer,
because both errors add up to the one that is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.ir.chains import MAX_WEIGHTS, AffineChain
from fhe_fx.ir.ops import LINEAR
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.bases import Bases, bases_of
from fhe_fx.quant.rank import first, look_ups_of_matmul, rank_error
from fhe_fx.quant.sensitivity import sensitivities

__all__ = ["ReduceChannels"]

_LEAST = 2
"""Channels that are always kept. What calibration has not seen finds a way through them; and with a
single one each weight of x would meet one value alone, and be given a scale of its own."""


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
        bases = _bases(program, node, mean)
        error = rank_error(program, bases, lambda p: _Reduced(program.module, node, p, mean))
        rank = self._rank(program, node, error)
        channels = d.shape_of(node)[-1]
        if rank == channels:
            return False
        program.left_out += error(rank) ** 2
        b = program.before(node, self)
        left, right = (m.float() for m in bases.equalized(rank, program.options.seed))
        new = b.linear(b.matmul(x, b.linear(y, left)), right.mT)
        left, right = bases.kept(rank)
        lost = (torch.eye(channels, dtype=torch.float64) - left @ right.mT).float()
        rows = b.linear(b.transpose(b.linear(y, lost), -2, -1), mean.mT)
        program.replace(node, b.add(new, b.transpose(rows, -2, -1)))
        return True

    def _rank(self, program: Program, node: fx.Node, error: Callable[[int], float]) -> int:
        """Return the rank at which the circuit costs least, if results err as is allowed."""
        allowed = program.options.max_error
        if allowed is None:
            allowed = self.usual_error * 2.0**-program.options.n_bits
        variance = allowed**2 - program.left_out
        channels = d.shape_of(node)[-1]
        each = look_ups_of_matmul(node) / d.shape_of(node.args[0])[-1]  # type: ignore[arg-type]
        others = sum(look_ups_of_matmul(n) for n in program.calls(d.MATMUL) if n is not node)

        def price(rank: int) -> float:
            spent = error(rank) ** 2 if rank < channels else 0.0
            if variance <= 0 or spent > self.most * variance:
                return math.inf if rank < channels else others + channels * each
            cost: float = others + rank * each
            return cost * math.pow(1.0 - spent / variance, -1.0 / self.exchange)

        least = first(range(min(_LEAST, channels), channels + 1), lambda r: price(r) < math.inf)
        # It falls to its minimum and rises from there: errors fall faster where they are large.
        return first(
            range(least, channels + 1), lambda r: r == channels or price(r + 1) >= price(r)
        )


def _reason_against(node: fx.Node) -> str | None:
    """Say why no weights carry a basis from before a product to behind it, or None."""
    y = AffineChain.of(d.input_node(node, 1))
    if (reason := y.reason_against_one_product()) is not None:
        return reason
    readers = d.readers(node)
    if any(not d.is_call(r, LINEAR) for r in readers):
        return "more than clear weights read it"
    n_weights = math.prod(d.shape_of(y.sources[0])) * max(math.prod(d.shape_of(r)) for r in readers)
    if n_weights > MAX_WEIGHTS:
        return f"the composed weights would be {n_weights:,} numbers"
    return None


def _bases(program: Program, node: fx.Node, mean: Tensor) -> Bases:
    """Find the basis in which deviations of x, times y, move the results by few channels."""
    x, y = (program.observed[o.name].double() for o in d.operands(node))
    gradient = sensitivities(program, program.samples, draws=1, nodes=[node])[node.name][0].double()
    weights = (x - mean).square().sum(-2).unsqueeze(-1)  # of each row of y, over the rows of x
    lead = d.shape_of(node)[:-2]
    y = y.expand(len(y), *lead, *y.shape[-2:])
    values = ((y * weights).mT @ y).mean(0)
    results = (gradient.mT @ gradient).mean(0)
    return bases_of(values, results)


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

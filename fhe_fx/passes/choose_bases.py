"""Contract two encrypted matrices over fewer channels, in a basis made for their values.

Not exact: results change by at most `tolerance` of what rounding to `n_bits` would change them.
Within that, channels are kept as long as one more takes a larger part of the squared error away
than it adds to the cost (`exchange`): weights that were trained need few, random ones many.
With the means m of x and n of y, x y = (x - m)(y - n) + m y + x n - m n, and all but the first
term is affine: clear weights, no look-up. In that one any basis may be chosen, x y = (x A)(B^T y),
and weights carry it for nothing. Channels that hardly contribute are left out: each saves
R C + R + C look-ups, of R rows and C columns. The others are rotated until all vary alike, since
one scale serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.ir.build import compact
from fhe_fx.ir.chains import AffineChain
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.bases import find_bases
from fhe_fx.quant.rank import first, look_ups_of_matmul, rank_error

__all__ = ["ChooseBases"]


@register
@dataclass(frozen=True)
class ChooseBases(Pass):
    """Rewrite each `matmul` of two clear-weight products."""

    name: ClassVar[str] = "choose-bases"
    requires: ClassVar[frozenset[str]] = frozenset({"calibrated", "normal"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})
    is_exact: ClassVar[bool] = False

    tolerance: float = 1.0
    """Error of the results that leaving out channels may make, in parts of 2**-n_bits of their
    size. One is what rounding the results to that many bits would make, about."""
    part_of_budget: float = 0.5
    """The same where the options give a `max_error`, in parts of it: both add up by squares."""
    exchange: float = 2.0
    """By how many per cent of itself the results' squared error must fall for a per cent of cost:
    where parameters are cheapest, bits and `p_error` buy as much. At 0 no channel more is kept than
    the tolerance asks for."""
    usual_error: float = 1.2
    """Error that look-ups will make besides, in the unit of `tolerance`."""
    rotates: bool = True
    """Whether the directions kept are rotated until each channel varies alike; else the first
    varies most, and all have the slots that it needs."""

    def run(self, program: Program) -> bool:
        """Rewrite one product after the other."""
        changed = False
        for node in program.calls(d.MATMUL):
            against = [AffineChain.of(o).reason_against_one_product() for o in d.operands(node)]
            if reason := next(filter(None, against), None):
                program.note(self, node, f"no weights carry a basis of an operand: {reason}")
                continue
            self._rewrite(program, node)
            changed = True
        return changed

    def _rewrite(self, program: Program, node: fx.Node) -> None:
        x, y = d.input_node(node), d.input_node(node, 1)
        means = _Means.of(program, node)
        bases = find_bases(
            _rows(program.observed[x.name] - means.left),
            _rows(program.observed[y.name].mT - means.right.mT),
        )
        error = rank_error(program, bases, lambda p: _Projected(program.module, node, p, means))
        rank = self._rank(program, node, error)
        program.left_out += error(rank) ** 2
        b = program.before(node, self)
        columns = b.transpose(y, -2, -1)
        of_left, of_right = (
            AffineChain.of(term).as_one_product(b)
            for term in (b.linear(columns, means.left.mT), b.linear(x, means.right))
        )
        affine = b.add(of_right, b.transpose(of_left, -2, -1))
        new = b.shift(affine, -means.left @ means.right)
        if rank:
            chosen = (
                bases.equalized(rank, program.options.seed) if self.rotates else bases.kept(rank)
            )
            left, right = (m.float() for m in chosen)
            rows = b.linear(b.shift(x, compact(-means.left)), left)
            columns = b.linear(b.shift(columns, compact(-means.right.mT)), right)
            new = b.add(b.matmul(rows, b.transpose(columns, -2, -1)), new)
        program.replace(node, new)

    def _rank(self, program: Program, node: fx.Node, error: Callable[[int], float]) -> int:
        """Return the rank of least error and cost together, of those within the tolerance."""
        budget = program.options.max_error
        allowed, besides = (
            part * 2.0**-program.options.n_bits for part in (self.tolerance, self.usual_error)
        )
        if budget is not None:
            allowed, besides = self.part_of_budget * budget, budget
        channels: int = d.shape_of(node.args[0])[-1]  # type: ignore[arg-type]
        # All of them always do: what is left then is float rounding.
        least = first(range(channels + 1), lambda r: r == channels or error(r) <= allowed)
        if not self.exchange:
            return least
        others = sum(look_ups_of_matmul(n) for n in program.calls(d.MATMUL) if n is not node)
        each = look_ups_of_matmul(node) / channels

        def price(rank: int) -> float:
            cost: float = (others + rank * each) ** self.exchange
            return (besides**2 + error(rank) ** 2) * cost

        # It falls to its minimum and rises from there: errors fall faster where they are large.
        return first(
            range(least, channels + 1), lambda r: r == channels or price(r + 1) >= price(r)
        )


@dataclass(frozen=True)
class _Means:
    """Means over the samples of both operands of a product, every row and column for itself."""

    left: Tensor
    """`[*lead, R, K]`."""
    right: Tensor
    """`[*lead, K, C]`."""

    @staticmethod
    def of(program: Program, node: fx.Node) -> _Means:
        return _Means(*(program.observed[o.name].mean(0) for o in d.operands(node)))


class _Projected(BatchInterpreter):
    """Runs a graph in which the deviations of one product's operands meet through a projector."""

    def __init__(
        self, module: fx.GraphModule, node: fx.Node, projector: Tensor, means: _Means
    ) -> None:
        super().__init__(module)
        self.node, self.projector, self.means = node, projector, means

    def run_node(self, n: fx.Node) -> Any:
        if n is self.node:
            x, y = (self.env[operand] for operand in d.operands(n))
            left, right = self.means.left, self.means.right
            return (x - left) @ self.projector @ (y - right) + left @ (y - right) + x @ right
        return super().run_node(n)


def _rows(values: Tensor) -> Tensor:
    """Turn values `[n_samples, *lead, R, K]` of R rows into `[n_samples * R, *lead, K]`."""
    return values.movedim(-2, 0).flatten(0, 1)

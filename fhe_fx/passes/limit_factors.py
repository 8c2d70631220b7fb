"""Limit a factor that a table returns to the range in which its product errs least.

Not exact: values beyond the limits are answered with the limit, where that lowers the expected
error of the product over the calibration samples. A factor with rare large values (the reciprocal
deviation of a row that hardly varies) sets the range that all its values share: every slot is as
wide as the rarest row demands, and that row multiplies the rounding of the other factor by as much.
The table that makes the factor holds the limits, so they cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import compact, elementwise
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.classes import Classes, find_classes
from fhe_fx.quant.factors import Factor, ProductError
from fhe_fx.quant.rounded import rounded_values

__all__ = ["LimitFactors"]

_PARTS = tuple(0.75**k for k in range(1, 25))
"""Limits that are tried, in parts of the way from the median of a factor to the end of its range.
The last is a thousandth of the way: a factor may be that much larger in one row than in most."""

_VALUES = 1 << 18
"""Values of a product from which its error is estimated, about."""


@register
@dataclass(frozen=True)
class LimitFactors(Pass):
    """Clamp the results of maps that only one product reads."""

    name: ClassVar[str] = "limit-factors"
    requires: ClassVar[frozenset[str]] = frozenset({"calibrated", "fused", "no-matmul"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated", "fused"})
    is_exact: ClassVar[bool] = False

    least_gain: float = 0.1
    """Part of a product's squared error that limits must save; less is within the samples' luck."""

    def run(self, program: Program) -> bool:
        """Try limits on each factor of each product."""
        if not program.calls(d.MUL):
            return False
        classes = find_classes(program)
        size = max(program.observed[n.name].numel() for n in program.calls(d.MUL))
        kept, draws = -(-size // _VALUES), max(1, min(16, _VALUES // size))
        samples = list(program.samples[::kept]) * draws
        names = {operand.name for n in program.calls(d.MUL) for operand in d.operands(n)}
        exact = {name: torch.cat([program.observed[name][::kept]] * draws) for name in names}
        rounded = rounded_values(program, classes, samples, names)
        found = {}
        for product in program.calls(d.MUL):
            for factor, argument, other in _factors(product):
                limits = self._limits(program, classes, exact, rounded, (factor, argument, other))
                if limits is not None:
                    found[factor] = limits
        for factor, limits in found.items():
            readers = list(factor.users)
            b = program.before(factor.next, self, factor)
            clamp = elementwise((torch.ops.aten.clamp.Tensor, limits, {}))
            limited = b.map(factor, clamp, "limit")
            for reader in readers:
                reader.replace_input_with(factor, limited)
        return bool(found)

    def _limits(
        self,
        program: Program,
        classes: Classes,
        exact: dict[str, Tensor],
        rounded: dict[str, Tensor],
        nodes: tuple[fx.Node, fx.Node, fx.Node],
    ) -> tuple[Tensor, Tensor] | None:
        """Return the best limits of each element of a factor, or None if none gain enough."""
        factor, *operands = nodes
        y, x = (Factor(exact[n.name], rounded[n.name], classes.of[n]) for n in operands)
        own = classes.of[factor]
        error = ProductError(y, x, program.options.lookup_bits)
        low, high = (
            torch.full((classes.n_classes,), end).double() for end in (-torch.inf, torch.inf)
        )
        values = program.observed[factor.name]
        least, greatest = classes.extremes(factor, values)
        median = _medians(values, own, classes.n_classes)
        before = best = error.of(low, high)
        for ends, reach in ((high, greatest - median), (low, least - median)):
            for part in _PARTS:
                tried = ends.clone()
                ends.copy_(median + part * reach)
                found = error.of(low, high)
                is_better = found < best
                best = torch.where(is_better, found, best)
                ends.copy_(torch.where(is_better, ends, tried))
        gains = best < (1 - self.least_gain) * before
        if not bool(gains.any()):
            return None
        low, high = low.masked_fill(~gains, -torch.inf), high.masked_fill(~gains, torch.inf)
        return compact(low[own]), compact(high[own])


def _factors(product: fx.Node) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """List the factors to limit: the map, the moved map that is multiplied, the other factor."""
    arguments = d.operands(product)
    if len(arguments) != 2:
        return []
    found = []
    for argument, other in (arguments, reversed(arguments)):
        factor = d.before_moves(argument)
        if d.is_map(factor) and d.readers(factor) == {product}:
            found.append((factor, argument, other))
    return found


def _medians(values: Tensor, index: Tensor, n_classes: int) -> Tensor:
    medians = torch.zeros(n_classes, dtype=torch.float64)
    flat = values.flatten(1).double()
    for number in torch.unique(index):
        medians[number] = flat[:, (index == number).reshape(-1)].median()
    return medians

"""Give every look-up its input width, and the circuit its `p_error`, at the least cost.

Exact in float: widths only take effect when integers are made. Rounding to a slot and the noise of
a bootstrap, which reads a neighbouring slot, are one error with one variance, and behind an
approximate rounding both are unbiased: so few bits that are never misread and many that often are
buy the same precision, and the second is cheaper. The pass knows what variance each look-up adds to
the results, by derivatives on the calibration samples, and what a look-up costs at each width and
`p_error`, by a table of Concrete's optimizer; of all that keep the results' error within the
budget it takes the cheapest. A few look-ups often make most of the error: those are read several
times (`quant/readings.py`), and their mean errs less.

The budget is `max_error`, or what rounding every look-up to `n_bits + lookup_extra_bits` bits alone
would make; with `max_cost` the least error is taken instead. Two widths at most (`most_widths`):
each has keys of its own. A `p_error` that was given is kept, and then every look-up reads `n_bits +
lookup_extra_bits` bits unless a budget was given too; so they do where no width would keep to the
default budget. A look-up that a rule names has the width of the rule; one whose node carries a
width already (`node.meta["lookup_bits"]`) keeps it.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import fx

from fhe_fx.errors import PassError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.printer import operator_name
from fhe_fx.ir.program import Program
from fhe_fx.options import MAX_LOOKUP_BITS, Options
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.lookup_cost import cost_table, lookup_cost
from fhe_fx.quant.noise import lookup_variance
from fhe_fx.quant.noise_level import log_norm_of, spare_bits
from fhe_fx.quant.readings import Readings
from fhe_fx.quant.response import lookup_responses

__all__ = ["AllotBits"]


@register
@dataclass(frozen=True)
class AllotBits(Pass):
    """Set `lookup_bits`, `readings`, `error_variance` on maps, and `program.options.p_error`.

    `node.meta["error_variance"]` is what one reading adds to the results' variance, in parts of it.
    """

    name: ClassVar[str] = "allot-bits"
    requires: ClassVar[frozenset[str]] = frozenset({"fused", "calibrated", "no-products"})
    gives: ClassVar[frozenset[str]] = frozenset({"bits"})

    least_saving: float = 0.2
    """Part of the cost that a second width must save: it has keys of its own, half a gigabyte."""
    narrower: int = 3
    """By how many bits the second width may be narrower than the first."""
    most_readings: int = 4
    """How often a look-up may be read, to take the mean; 1 where none is."""
    room_for_readings: int = 4
    """Bits by which what a look-up reads can be multiplied at no cost, if it is read repeatedly:
    there are as many small whole numbers that differ little as readings need."""
    exchange: float = 2.0
    """By how many per cent of itself the results' squared error must fall, without a budget, for a
    per cent of cost."""

    def run(self, program: Program) -> bool:
        """Choose among all pairs of widths at all `p_error` of the table."""
        options = program.options
        groups = self._groups(program)
        fixed = {g: g.fixed_bits for g in groups if g.fixed_bits is not None}
        free = [g for g in groups if g.fixed_bits is None]
        if options.is_uniform:
            chosen = _uniform(options, free, fixed)
        else:
            chosen = self._cheapest(program, free, fixed)
        for g, bits in chosen.bits.items():
            g.node.meta["lookup_bits"], g.node.meta["readings"] = bits, chosen.readings.get(g, 1)
            g.node.meta["error_variance"] = f"{g.error(bits, chosen.p_error):.4g}"
        program.options = dataclasses.replace(options, p_error=chosen.p_error)
        return False

    def _cheapest(
        self, program: Program, free: Sequence[_Group], fixed: dict[_Group, int]
    ) -> _Allotment:
        options = program.options
        budget = _Budget.of(options, [*free, *fixed])
        log_norm = log_norm_of(program)
        by_need = sorted(free, key=lambda g: -g.response / g.look_ups)
        splits = _Splits(by_need, fixed, log_norm)
        best: dict[bool, _Split] = {}
        least_error, least_cost = math.inf, math.inf
        for p_error, wide, narrow in self._choices(options):
            for found in splits.of(p_error, wide, narrow, budget):
                least_error = min(least_error, found.error)
                least_cost = min(least_cost, found.cost)
                is_mixed = wide != narrow
                if budget.holds(found) and (
                    is_mixed not in best or budget.rank(found) < budget.rank(best[is_mixed])
                ):
                    best[is_mixed] = found
        if not best and budget.is_default:
            return _uniform(options, free, fixed)
        if not best:
            raise PassError(budget.refusal(program.name, math.sqrt(least_error), least_cost))
        chosen = next(iter(best.values()))
        if len(best) == 2:
            is_worth_it = best[True].cost <= (1 - self.least_saving) * best[False].cost
            if budget.max_cost is not None:
                is_worth_it = best[True].error <= (1 - self.least_saving) * best[False].error
            chosen = best[is_worth_it]
        return splits.allotment(chosen, self.exchange if budget.is_default else None)

    def _groups(self, program: Program) -> list[_Group]:
        responses, spare = lookup_responses(program), spare_bits(program)

        def rule_of(n: fx.Node) -> int | None:
            path = str(n.meta.get("module_path", ""))
            return program.options.rule_for(path, operator_name(n))

        return [
            _Group(
                n,
                math.prod(d.shape_of(n)),
                responses[n.name],
                n.meta.get("lookup_bits", rule_of(n)),
                self.most_readings if spare[n] >= self.room_for_readings else 1,
            )
            for n in program.maps()
        ]

    def _choices(self, options: Options) -> Iterator[tuple[float, int, int]]:
        """List all `p_error` with two widths each, the second at most as wide."""
        table = cost_table()
        p_errors = table.p_errors if options.p_error is None else (options.p_error,)
        widths = range(min(table.by_bits), MAX_LOOKUP_BITS + 1)
        narrower = self.narrower if options.most_widths == 2 else 0
        for p_error, wide in itertools.product(p_errors, widths):
            for narrow in range(max(wide - narrower, widths.start), wide + 1):
                yield p_error, wide, narrow


@dataclass(frozen=True, eq=False)
class _Group:
    """The look-ups of one map."""

    node: fx.Node
    look_ups: int
    response: float
    """As `lookup_responses` gives it."""
    fixed_bits: int | None
    most_readings: int
    """How often it may be read."""

    def error(self, bits: int, p_error: float) -> float:
        """Return the variance that it adds to the results, in parts of theirs."""
        return self.response * lookup_variance(bits, p_error)


@dataclass(frozen=True)
class _Allotment:
    """A width for every group, and one `p_error`."""

    p_error: float
    bits: dict[_Group, int]
    readings: dict[_Group, int] = dataclasses.field(default_factory=dict)
    """Of those that are read more than once."""


class _Split(NamedTuple):
    """What it costs to give the first groups one width, and the others a second."""

    error: float
    """Predicted variance of the results, in parts of theirs."""
    cost: float
    """Predicted complexity."""
    p_error: float
    wide: int
    narrow: int
    n_wide: int
    """How many groups have the first width; none where the two are one."""
    n_steps: int = 0
    """How many times a group is read once more."""


class _Splits:
    """Error and cost of every way to split the groups, by sums over the first k of them."""

    def __init__(
        self, by_need: Sequence[_Group], fixed: dict[_Group, int], log_norm: float
    ) -> None:
        """Add up.

        Args:
            by_need: groups whose width is free, those that need bits most first.
            fixed: the others, with their width.
            log_norm: of the noisiest sum.
        """
        self._by_need, self._fixed, self._log_norm = by_need, fixed, log_norm
        # Where all have one width, no width changes which step is the better one.
        self._steps = Readings.of(
            [g.response for g in by_need],
            [float(g.look_ups) for g in by_need],
            [g.most_readings for g in by_need],
        )
        self._responses = [0.0, *itertools.accumulate(g.response for g in by_need)]
        self._look_ups = [0, *itertools.accumulate(g.look_ups for g in by_need)]

    def of(self, p_error: float, wide: int, narrow: int, budget: _Budget) -> Iterator[_Split]:
        """List the ways with two widths; with one, the one that the budget asks for."""
        log_norm, bits = self._log_norm, self._fixed
        error = sum(g.error(b, p_error) for g, b in bits.items())
        cost = sum(g.look_ups * lookup_cost(b, p_error, log_norm) for g, b in bits.items())
        errors = [lookup_variance(b, p_error) for b in (wide, narrow)]
        costs = [lookup_cost(b, p_error, log_norm) for b in (wide, narrow)]
        if wide == narrow:
            steps = [
                _Split(error + left * errors[0], cost + spent * costs[0], p_error, wide, wide, 0, n)
                for n, (left, spent) in enumerate(
                    zip(self._steps.errors, self._steps.costs, strict=True)
                )
            ]
            yield budget.step(steps if self._has_one_width(wide, narrow) else steps[:1])
            return
        for n in range(1, len(self._by_need)):
            responses = self._responses[n], self._responses[-1] - self._responses[n]
            counts = self._look_ups[n], self._look_ups[-1] - self._look_ups[n]
            yield _Split(
                error + responses[0] * errors[0] + responses[1] * errors[1],
                cost + counts[0] * costs[0] + counts[1] * costs[1],
                p_error, wide, narrow, n,
            )  # fmt: skip

    def allotment(self, split: _Split, exchange: float | None) -> _Allotment:
        """Return the width of every group, and how often it is read.

        Args:
            split: which.
            exchange: what reading once more must save, where no budget said how often.
        """
        bits = {
            g: split.wide if i < split.n_wide else split.narrow for i, g in enumerate(self._by_need)
        }
        n_steps = split.n_steps
        if exchange is not None and self._has_one_width(split.wide, split.narrow):
            n_steps = self._steps.worthwhile(exchange)
        readings = dict(zip(self._by_need, self._steps.counts(n_steps), strict=True))
        return _Allotment(split.p_error, self._fixed | bits, readings)

    def _has_one_width(self, wide: int, narrow: int) -> bool:
        """Say whether all look-ups have one width.

        If not, none is read repeatedly: the wide ones, which would be, have parameters of their own
        and no noise beside theirs that hides what is multiplied.
        """
        return {wide, narrow, *self._fixed.values()} == {wide}


@dataclass(frozen=True)
class _Budget:
    """What an allotment must keep to."""

    variance: float | None
    max_cost: float | None
    is_default: bool = False

    @staticmethod
    def of(options: Options, groups: Sequence[_Group]) -> _Budget:
        if options.max_cost is not None:
            return _Budget(None, options.max_cost)
        if options.max_error is not None:
            return _Budget(options.max_error**2, None)
        exact = lookup_variance(options.lookup_bits, 0.0)
        return _Budget(sum(g.response for g in groups) * exact, None, is_default=True)

    def holds(self, found: _Split) -> bool:
        if self.variance is not None:
            return found.error <= self.variance
        assert self.max_cost is not None
        return found.cost <= self.max_cost

    def step(self, steps: Sequence[_Split]) -> _Split:
        """Return the first that keeps to an error, or the last that keeps to a cost."""
        if self.is_default:
            return steps[0]
        if self.max_cost is not None:
            return steps[
                max(0, bisect.bisect_right(steps, self.max_cost, key=lambda s: s.cost) - 1)
            ]
        number = bisect.bisect_left(steps, True, key=self.holds)
        return steps[min(number, len(steps) - 1)]

    def rank(self, found: _Split) -> tuple[float, float]:
        is_for_cost = self.max_cost is None
        return (found.cost, found.error) if is_for_cost else (found.error, found.cost)

    def refusal(self, name: str, least_error: float, least_cost: float) -> str:
        if self.max_cost is not None:
            return (
                f"{name}: max_cost={self.max_cost:.2g} cannot be kept; the cheapest widths cost "
                f"{least_cost:.2g}. Try max_cost={1.1 * least_cost:.1e}, a shorter circuit, or "
                f"fewer heads."
            )
        assert self.variance is not None
        return (
            f"{name}: max_error={math.sqrt(self.variance):.2g} cannot be kept; look-ups of "
            f"{MAX_LOOKUP_BITS} bits err by {least_error:.2g} of the results' deviation. "
            f"Try max_error={1.1 * least_error:.1e}."
        )


def _uniform(options: Options, free: Sequence[_Group], fixed: dict[_Group, int]) -> _Allotment:
    bits = fixed | dict.fromkeys(free, options.lookup_bits)
    return _Allotment(options.chosen_p_error, bits)

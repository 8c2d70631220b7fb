"""Give look-ups and results their bits, and the circuit its `p_error`, at the least cost.

Exact in float: widths only take effect when integers are made. Rounding to a slot and the noise of
a bootstrap, which reads a neighbouring slot, are one error with one variance, and behind an
approximate rounding both are unbiased: so few bits that are never misread and many that often are
buy the same precision, and the second is cheaper. The pass knows what variance each look-up adds to
the results, by derivatives on the calibration samples, and what a look-up costs at each width and
`p_error`, by a table of Concrete's optimizer; of all that keep the results' error within the
budget it takes the cheapest, or by default one that errs less for a little more. Results, and the
weights of answers, have bits as long as one more is worth its price. A few look-ups often make most
of the error: those are read several times (`quant/readings.py`), and their mean errs less.

The budget is `max_error`, or a part of what rounding every look-up to `n_bits + lookup_extra_bits`
bits alone would make; with `max_cost` the least error is taken instead. Two widths at most
(`most_widths`): each has keys of its own. A `p_error` that was given is kept, and then every
look-up reads `n_bits + lookup_extra_bits` bits unless a budget was given too; so they do where no
width would keep to the default budget. A look-up that a rule names has the width of the rule; one
whose node carries a width already (`node.meta["lookup_bits"]`) keeps it.
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
from fhe_fx.quant.answer_weights import coarser_by, weighed_answers, weights_responses
from fhe_fx.quant.classes import find_classes
from fhe_fx.quant.lookup_cost import cost_table, lookup_cost
from fhe_fx.quant.noise import lookup_variance
from fhe_fx.quant.noise_level import NoiseLevel
from fhe_fx.quant.readings import Readings
from fhe_fx.quant.response import lookup_responses, result_response

__all__ = ["AllotBits"]

_UNSURE = 0.25
"""Bits by which the noise of results may turn out greater than it is predicted in float: prices
rise in steps."""
_SYSTEMATIC = 4.0
"""What the squared error of rounded weights counts for, beside independent errors: it is the same
function of every row, and does not average out over them."""
_KEPT_TO = 0.95
"""Part of a `max_error` that predictions have to keep to: what is then measured has been up to a
fiftieth larger."""
_WORTH_MORE = 1.1
"""By what factor a default budget's cost may rise for less error than it allows. A little takes the
misreadings of a polynomial size down to what it can do; the next size costs twice as much."""
_LEAST = 0.25
"""Part of the squared error allowed that look-ups may make at least, whatever was left out."""
_AS_CHEAP = 1.03
"""Costs are told apart beyond this factor: the table is as exact."""


@register
@dataclass(frozen=True)
class AllotBits(Pass):
    """Set `lookup_bits`, `readings`, `error_variance` on maps, and `program.options.p_error`.

    `node.meta["error_variance"]` is what one reading adds to the results' variance, in parts of it;
    on a result, what rounding it adds. `program.options.result_bits` is set, too, and on products
    of answers `weight_bits`, and `weight_response`, what rounding to the usual bits adds.
    """

    name: ClassVar[str] = "allot-bits"
    requires: ClassVar[frozenset[str]] = frozenset({"fused", "calibrated", "no-products"})
    gives: ClassVar[frozenset[str]] = frozenset({"bits"})

    p_errors: tuple[float, ...] = (
        0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7
    )  # fmt: skip
    """Those that are tried, if none was given. Beyond, a bit less at a smaller one has the same
    noise at the same price."""
    least_saving: float = 0.5
    """Part of the cost that a second width must save by the table: it has keys of its own, half a
    gigabyte, and circuits of two widths have cost more than twice what the table says."""
    narrower: int = 3
    """By how many bits the second width may be narrower than the first."""
    result_bits: tuple[int, ...] = (7, 8, 9, 10, 11, 12)
    """Bits of results that are tried, if none were given."""
    most_readings: int = 4
    """How often a look-up may be read, to take the mean; 1 where none is."""
    exchange: float = 1.5
    """By how many per cent of itself the squared error must fall for a per cent of cost, for a
    look-up to be read once more: bits and `p_error` buy as much."""
    part_of_rounding: float = 0.75
    """Budget where none is given, in parts of the squared error that rounding every look-up to
    `n_bits + lookup_extra_bits` bits alone would make: what two bits more just keep to that are
    misread three times in five, the most for a polynomial of twice as many coefficients. What
    readings take away comes besides."""

    def run(self, program: Program) -> bool:
        """Choose among all pairs of widths at all `p_error` of the table."""
        options = program.options
        groups = self._groups(program)
        fixed = {g: g.fixed_bits for g in groups if g.fixed_bits is not None}
        free = [g for g in groups if g.fixed_bits is None]
        inner, outer = weighed_answers(program)
        for n in (*inner, *outer):
            n.meta.pop("weight_bits", None)
        responses = weights_responses(program, (*inner, *outer))
        for n, response in responses.items():
            n.meta["weight_response"] = response
        fewer = coarser_by({n: responses[n] for n in outer}, options.bits_of_answers_weights - 2)
        for n in outer:
            n.meta["weight_bits"] = options.bits_of_answers_weights - fewer[n]
        usual = _Results(
            bits=options.chosen_result_bits,
            weight_bits=options.bits_of_answers_weights,
            inner_weight_bits=options.bits_of_answers_weights,
            usual_weight_bits=options.bits_of_answers_weights,
            response=result_response(program),
            weights_response=sum(responses[n] * 4.0 ** fewer[n] for n in outer),
            inner_response=sum(responses[n] for n in inner),
        )
        if options.is_uniform:
            chosen = _uniform(options, free, fixed, usual)
        else:
            chosen = self._cheapest(program, free, fixed, usual, inner)
        for g, bits in chosen.bits.items():
            g.node.meta["lookup_bits"], g.node.meta["readings"] = bits, chosen.readings.get(g, 1)
            g.node.meta["error_variance"] = f"{g.error(bits, chosen.p_error):.4g}"
        for n in program.results:
            n.meta["error_variance"] = f"{chosen.results.error(chosen.p_error):.4g}"
        for n in outer:
            n.meta["weight_bits"] = max(2, chosen.results.weight_bits - fewer[n])
        for n in inner:
            n.meta["weight_bits"] = chosen.results.inner_weight_bits
        result_bits = options.result_bits if options.is_uniform else chosen.results.bits
        program.options = dataclasses.replace(
            options, p_error=chosen.p_error, result_bits=result_bits
        )
        return False

    def _cheapest(
        self,
        program: Program,
        free: Sequence[_Group],
        fixed: dict[_Group, int],
        usual: _Results,
        inner: Sequence[fx.Node],
    ) -> _Allotment:
        """Search with the noise of sums before anything is read twice, and with what there is then.

        The sum of several answers has the noise of as many; where that is dearer, fewer are better.
        Larger weights inside pass on more noise, too.
        """
        budget = _Budget.of(program, [*free, *fixed], self.part_of_rounding, self.exchange)
        found: list[tuple[tuple[bool, float, float], _Allotment]] = []
        exchanges = [self.exchange, self.exchange]
        if not budget.is_default:
            exchanges.insert(0, math.inf)  # nothing is read twice
        by_need = sorted(free, key=lambda g: -g.response / g.look_ups)
        for weight_bits in self._inner_weight_bits(program.options, usual):
            ending = dataclasses.replace(usual, inner_weight_bits=weight_bits)
            for n in inner:
                n.meta["weight_bits"] = weight_bits
            for g in (*free, *fixed):
                g.node.meta.pop("readings", None)
            for exchange in exchanges:
                noise = NoiseLevel.of(program)
                if found and noise.look_ups > cost_table().log_norms[-1]:
                    break  # there is no price for it
                splits = _Splits(by_need, fixed, noise, exchange)
                chosen = self._search(program, budget, splits, ending, may_fail=bool(found))
                if chosen is None:
                    continue
                for g in chosen.bits:
                    g.node.meta["readings"] = chosen.readings.get(g, 1)
                cost = chosen.cost(NoiseLevel.of(program))
                is_dearer = budget.max_cost is not None and cost > budget.max_cost
                rank = budget.rank(chosen.error, cost, chosen.results)
                found.append(((is_dearer, *rank), chosen))
        if not found:
            return _uniform(program.options, free, fixed, usual)
        return min(found, key=lambda pair: pair[0])[1]

    def _search(
        self,
        program: Program,
        budget: _Budget,
        splits: _Splits,
        usual: _Results,
        *,
        may_fail: bool,
    ) -> _Allotment | None:
        """Return the best allotment at today's noise.

        None where none keeps to a default budget, or to any where that `may_fail`.
        """
        holding: dict[bool, list[_Split]] = {}
        least_error, least_cost = math.inf, math.inf
        for p_error, wide, narrow, results in self._choices(program.options, usual):
            for found in splits.of(p_error, wide, narrow, results, budget):
                least_error = min(least_error, budget.bounded(found))
                least_cost = min(least_cost, found.cost)
                if budget.holds(found):
                    holding.setdefault(wide != narrow, []).append(found)
        best = {is_mixed: budget.best(splits) for is_mixed, splits in holding.items()}
        if not best and (budget.is_default or may_fail):
            return None
        if not best:
            raise PassError(budget.refusal(program.name, math.sqrt(least_error), least_cost))
        chosen = next(iter(best.values()))
        if len(best) == 2:
            is_worth_it = best[True].cost <= (1 - self.least_saving) * best[False].cost
            if budget.max_cost is not None:
                is_worth_it = best[True].error <= (1 - self.least_saving) * best[False].error
            chosen = best[is_worth_it]
        return splits.allotment(chosen)

    def _groups(self, program: Program) -> list[_Group]:
        responses = lookup_responses(program)
        most_readings = self.most_readings if _has_zeros(program) else 1

        def rule_of(n: fx.Node) -> int | None:
            path = str(n.meta.get("module_path", ""))
            return program.options.rule_for(path, operator_name(n))

        return [
            _Group(
                n,
                math.prod(d.shape_of(n)),
                responses[n.name],
                n.meta.get("lookup_bits", rule_of(n)),
                most_readings,
            )
            for n in program.maps()
        ]

    def _choices(
        self, options: Options, usual: _Results
    ) -> Iterator[tuple[float, int, int, _Results]]:
        """List all `p_error` with two widths each, the second at most as wide, and results."""
        table = cost_table()
        p_errors = self.p_errors if options.p_error is None else (options.p_error,)
        widths = range(min(table.by_bits), MAX_LOOKUP_BITS + 1)
        narrower = self.narrower if options.most_widths == 2 else 0
        for p_error in p_errors:
            results = self._results(options, usual, p_error)
            for wide, ending in itertools.product(widths, results):
                for narrow in range(max(wide - narrower, widths.start), wide + 1):
                    yield p_error, wide, narrow, ending

    def _inner_weight_bits(self, options: Options, usual: _Results) -> Sequence[float]:
        """List the bits to try of weights whose sums a look-up reads."""
        least = usual.usual_weight_bits
        if options.answer_weight_bits is not None or not usual.inner_response:
            return (least,)
        return [least + i / 2 for i in range(2 * max(0, options.weight_bits - least) + 1)]

    def _results(self, options: Options, usual: _Results, p_error: float) -> list[_Results]:
        """List the ways to round results, the best of each price."""
        given = options.result_bits
        bits = self.result_bits if given is None else (given,)
        weight_bits = range(max(2, usual.weight_bits - 2), options.weight_bits + 1)
        if options.answer_weight_bits is not None or not usual.weights_response:
            weight_bits = range(usual.weight_bits, usual.weight_bits + 1)
        best: dict[float, _Results] = {}
        for b, w in itertools.product(bits, weight_bits):
            found = dataclasses.replace(usual, bits=b, weight_bits=w)
            same = best.setdefault(found.price, found)
            best[found.price] = min(same, found, key=lambda r: r.error(p_error))
        return list(best.values())


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
class _Results:
    """How results, and the weights of answers, are rounded."""

    bits: int
    weight_bits: int
    """Of weights in front of results."""
    inner_weight_bits: float
    """Of weights whose sums a look-up reads."""
    usual_weight_bits: int
    response: float
    """As `result_response` gives it."""
    weights_response: float
    """As `weights_responses` gives it of the weights in front of results, for the usual bits."""
    inner_response: float
    """The same of the others."""

    @property
    def price(self) -> float:
        """By how many bits noise must be smaller than beside results of none."""
        return self.bits + self.weight_bits - self.usual_weight_bits + _UNSURE

    def error(self, p_error: float) -> float:
        """Return the variance that it adds to the results, in parts of theirs.

        Noise is as large beside a slot of theirs as beside one of a look-up, at most.
        """
        return self.response * lookup_variance(self.bits, p_error) + self.weights_error

    @property
    def weights_error(self) -> float:
        """Return what of it the weights make."""
        outer = self.weights_response * 4.0 ** (self.usual_weight_bits - self.weight_bits)
        return outer + self.inner_weights_error

    @property
    def inner_weights_error(self) -> float:
        """Return what of it the weights make whose sums a look-up reads."""
        return self.inner_response * math.exp2(
            2 * (self.usual_weight_bits - self.inner_weight_bits)
        )


@dataclass(frozen=True)
class _Allotment:
    """A width for every group and for results, and one `p_error`."""

    p_error: float
    results: _Results
    bits: dict[_Group, int]
    readings: dict[_Group, int] = dataclasses.field(default_factory=dict)
    """Of those that are read more than once."""

    @property
    def error(self) -> float:
        """Return the predicted variance of the results, in parts of theirs."""
        return self.results.error(self.p_error) + sum(
            g.error(bits, self.p_error) / self.readings.get(g, 1) for g, bits in self.bits.items()
        )

    def cost(self, noise: NoiseLevel) -> float:
        """Return the predicted complexity, at such a noise of sums."""
        p_error, result_bits = self.p_error, self.results.price
        price = {
            bits: lookup_cost(bits, p_error, noise.at(bits, p_error, result_bits))
            for bits in set(self.bits.values())
        }
        return sum(
            g.look_ups * self.readings.get(g, 1) * price[bits] for g, bits in self.bits.items()
        )


class _Split(NamedTuple):
    """What it costs to give the first groups one width, and the others a second."""

    error: float
    """Predicted variance of the results, in parts of theirs."""
    read_once: float
    """What of it look-ups would make if each were read once."""
    cost: float
    """Predicted complexity."""
    p_error: float
    wide: int
    narrow: int
    results: _Results
    n_wide: int
    """How many groups have the first width; none where the two are one."""
    n_steps: int = 0
    """How many times a group is read once more."""


class _Splits:
    """Error and cost of every way to split the groups, by sums over the first k of them."""

    def __init__(
        self,
        by_need: Sequence[_Group],
        fixed: dict[_Group, int],
        noise: NoiseLevel,
        exchange: float,
    ) -> None:
        """Add up.

        Args:
            by_need: groups whose width is free, those that need bits most first.
            fixed: the others, with their width.
            noise: of sums.
            exchange: as in `AllotBits`.
        """
        self._by_need, self._fixed = by_need, fixed
        self._noise = noise
        # Where all have one width, no width changes which step is the better one.
        self._steps = Readings.of(
            [g.response for g in by_need],
            [float(g.look_ups) for g in by_need],
            [g.most_readings for g in by_need],
        )
        self._most_steps = self._steps.worthwhile(exchange)
        self._responses = [0.0, *itertools.accumulate(g.response for g in by_need)]
        self._look_ups = [0, *itertools.accumulate(g.look_ups for g in by_need)]

    def of(
        self, p_error: float, wide: int, narrow: int, results: _Results, budget: _Budget
    ) -> Iterator[_Split]:
        """List the ways with two widths; with one, the one that the budget asks for."""
        fixed = _Allotment(p_error, results, self._fixed)
        error, cost = fixed.error, fixed.cost(self._noise)
        once = error - results.error(p_error)
        errors = [lookup_variance(b, p_error) for b in (wide, narrow)]
        norms = [self._noise.at(b, p_error, results.price) for b in (wide, narrow)]
        if not self._noise.is_known(p_error) or any(map(math.isinf, (cost, *norms))):
            return  # there is no price for it
        costs = [lookup_cost(b, p_error, n) for b, n in zip((wide, narrow), norms, strict=True)]
        if wide == narrow:
            steps = [
                _Split(
                    error + left * errors[0],
                    once + self._responses[-1] * errors[0],
                    cost + spent * costs[0],
                    p_error,
                    wide,
                    wide,
                    results,
                    0,
                    n,
                )
                for n, (left, spent) in enumerate(
                    zip(self._steps.errors, self._steps.costs, strict=True)
                )
            ]
            most = self._most_steps if self._has_one_width(wide, narrow) else 0
            yield budget.step(steps[: most + 1])
            return
        for n in range(1, len(self._by_need)):
            responses = self._responses[n], self._responses[-1] - self._responses[n]
            counts = self._look_ups[n], self._look_ups[-1] - self._look_ups[n]
            yield _Split(
                error + responses[0] * errors[0] + responses[1] * errors[1],
                once + responses[0] * errors[0] + responses[1] * errors[1],
                cost + counts[0] * costs[0] + counts[1] * costs[1],
                p_error, wide, narrow, results, n,
            )  # fmt: skip

    def allotment(self, split: _Split) -> _Allotment:
        """Return the width of every group, and how often it is read."""
        bits = {
            g: split.wide if i < split.n_wide else split.narrow for i, g in enumerate(self._by_need)
        }
        readings = dict(zip(self._by_need, self._steps.counts(split.n_steps), strict=True))
        return _Allotment(split.p_error, split.results, self._fixed | bits, readings)

    def _has_one_width(self, wide: int, narrow: int) -> bool:
        """Say whether all look-ups have one width.

        If not, none is read repeatedly: the wide ones, which would be, have keys of their own, and
        a second width is for what makes little of the error.
        """
        return {wide, narrow, *self._fixed.values()} == {wide}


@dataclass(frozen=True)
class _Budget:
    """What an allotment must keep to."""

    variance: float | None
    max_cost: float | None
    exchange: float
    """As in `AllotBits`."""
    is_default: bool = False

    @staticmethod
    def of(
        program: Program, groups: Sequence[_Group], part_of_rounding: float, exchange: float
    ) -> _Budget:
        options = program.options
        if options.max_cost is not None:
            return _Budget(None, options.max_cost, exchange)
        if options.max_error is not None:
            whole = (_KEPT_TO * options.max_error) ** 2
            return _Budget(max(whole - program.left_out, _LEAST * whole), None, exchange)
        exact = part_of_rounding * lookup_variance(options.lookup_bits, 0.0)
        return _Budget(sum(g.response for g in groups) * exact, None, exchange, is_default=True)

    def bounded(self, found: _Split) -> float:
        """Return the error that is held against a budget; weights err whatever look-ups do."""
        return found.read_once if self.is_default else found.error - found.results.weights_error

    def holds(self, found: _Split) -> bool:
        if self.variance is not None:
            return self.bounded(found) <= self.variance
        assert self.max_cost is not None
        return found.cost <= self.max_cost

    def step(self, steps: Sequence[_Split]) -> _Split:
        """Return the first that keeps to an error, or the last that keeps to a cost."""
        if self.is_default:
            return steps[-1]
        if self.max_cost is not None:
            return steps[
                max(0, bisect.bisect_right(steps, self.max_cost, key=lambda s: s.cost) - 1)
            ]
        number = bisect.bisect_left(steps, True, key=self.holds)
        return steps[min(number, len(steps) - 1)]

    def best(self, splits: Sequence[_Split]) -> _Split:
        """Return the cheapest, and of those that cost as much the one that errs least.

        By default the budget is that of look-ups, and results are as fine as is worth its price; so
        are look-ups, for a little more than they cost at least.
        """
        if self.max_cost is not None:
            return min(splits, key=lambda s: (s.error, s.cost))
        if not self.is_default:
            most = _AS_CHEAP * min(s.cost for s in splits)
            return min((s for s in splits if s.cost <= most), key=lambda s: (s.error, s.cost))
        least: dict[float, float] = {}
        for s in splits:
            least[s.results.price] = min(s.cost, least.get(s.results.price, math.inf))
        return min(
            (s for s in splits if s.cost <= _WORTH_MORE * least[s.results.price]),
            key=lambda s: self.rank(s.error, s.cost, s.results),
        )

    def rank(self, error: float, cost: float, results: _Results) -> tuple[float, float]:
        if self.is_default:
            felt = error + (_SYSTEMATIC - 1) * results.weights_error
            return self.exchange * math.log(max(cost, 1.0)) + math.log(max(felt, 1e-30)), cost
        return (cost, error) if self.max_cost is None else (error, cost)

    def refusal(self, name: str, least_error: float, least_cost: float) -> str:
        if self.max_cost is not None:
            return (
                f"{name}: max_cost={self.max_cost:.2g} cannot be kept; the cheapest widths cost "
                f"{least_cost:.2g}. Try max_cost={1.1 * least_cost:.1e}, a shorter circuit, or "
                f"fewer heads."
            )
        assert self.variance is not None
        asked = math.sqrt(self.variance) / _KEPT_TO
        return (
            f"{name}: max_error={asked:.2g} cannot be kept; look-ups of "
            f"{MAX_LOOKUP_BITS} bits err by {least_error:.2g} of the results' deviation. "
            f"Try max_error={1.1 * least_error:.1e}."
        )


def _has_zeros(program: Program) -> bool:
    """Say whether there is an input that only weights read, from which zeros can be made."""
    classes = find_classes(program)
    read = {int(c) for n in program.maps() for c in classes.of[d.input_node(n)].unique()}
    inputs = filter(d.is_encrypted, program.placeholders)
    return any(read.isdisjoint(classes.of[p].unique().tolist()) for p in inputs)


def _uniform(
    options: Options, free: Sequence[_Group], fixed: dict[_Group, int], usual: _Results
) -> _Allotment:
    bits = fixed | dict.fromkeys(free, options.lookup_bits)
    return _Allotment(options.chosen_p_error, usual, bits)

"""Runs integers on the calibration samples, and tallies what overflows at each place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.ir.ops import LOOKUP, ROUND
from fhe_fx.ir.types import ValueType
from fhe_fx.ir.views import Lookup, Round
from fhe_fx.quant.left_out import Ends, ends_without, fold_numbers
from fhe_fx.quant.lookup_noise import LookupNoise
from fhe_fx.quant.overflow import Overflow, Places, Tally
from fhe_fx.quant.ranges import sample_ends

if TYPE_CHECKING:
    from fhe_fx.ir.program import Program

__all__ = ["estimate_overflow"]

_ELEMENTS = 1 << 22
"""Elements of the largest tensor that is computed at once; more samples are run in parts."""


def estimate_overflow(
    exact: Program, integers: Program, maps: Mapping[fx.Node, fx.Node]
) -> tuple[dict[fx.Node, Overflow], list[Overflow]]:
    """Estimate what will be clipped or wrap on inputs that calibration never saw.

    Args:
        exact: the float program, with observed values, and `node.meta["classes"]` on its nodes.
        integers: what it was lowered to.
        maps: the map that each look-up stands for.

    Returns:
        For every encrypted input and every look-up, by node; and for every result.
    """
    run = _Run(exact, integers, maps)
    encoded, real = _encoded(integers), integers.stacked(integers.samples)
    largest = max((math.prod(d.shape_of(n)) for n in integers.encrypted()), default=1)
    numbers = torch.arange(len(integers.samples))
    for part in numbers.split(max(1, _ELEMENTS // max(1, largest))):
        run.samples = part
        for node, values in zip(integers.placeholders, real, strict=True):
            if node in run.inputs:
                run.send(node, values[part])
        with torch.no_grad():
            results = run.run(*[x[part] for x in encoded])
        for place, result in enumerate(results):
            run.receive(place, result)
    return run.found()


def _encoded(program: Program) -> list[Tensor]:
    """Encode the calibration samples as a client would, `[n_samples, *shape]` a placeholder."""
    encoded = []
    for node, real in zip(program.placeholders, program.stacked(program.samples), strict=True):
        t: ValueType = node.meta["type"]
        encoded.append(((real.double() - t.offset) / t.scale).round().clamp(t.low, t.high).long())
    return encoded


class _Run(BatchInterpreter):
    """Runs integers with the noise of look-ups."""

    def __init__(self, exact: Program, integers: Program, maps: Mapping[fx.Node, fx.Node]) -> None:
        super().__init__(integers.module)
        self.exact, self.integers, self.maps = exact, integers, maps
        options = integers.options
        self.noise = LookupNoise.of(options.chosen_p_error, options.seed)
        self.samples = torch.arange(0)
        """Numbers of the samples that are run."""
        ports = zip(integers.placeholders, exact.placeholders, strict=True)
        self.inputs = {n: e for n, e in ports if not d.is_clear(n)}
        self.tallies = {n: _tally_of_input(exact, e, n) for n, e in self.inputs.items()}
        self.tallies |= {
            n: _tally_of_lookup(exact, m, n, self.noise.deviation) for n, m in maps.items()
        }
        pairs = zip(exact.results, integers.results, strict=True)
        self.results = [_tally_of_result(exact, e, n) for e, n in pairs]

    def send(self, node: fx.Node, real: Tensor) -> None:
        """Tally what the client clips."""
        t: ValueType = node.meta["type"]
        unit = t.scale.expand(d.shape_of(node)).reshape(-1)

        def errors(at: Places, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
            beyond = x - torch.minimum(torch.maximum(x, low), high)
            return beyond * unit[at[1]].unsqueeze(1)

        self.tallies[node].add((real.double() - t.offset) / t.scale, self.samples, errors)

    def run_node(self, n: fx.Node) -> Any:
        """Tally what a look-up reads, and disturb it; leave a result as it is before it wraps."""
        if d.is_call(n, ROUND):
            result = Round.of(n)
            return self.env[result.x].double() / (1 << result.lsbs)
        if not d.is_call(n, LOOKUP):
            return super().run_node(n)
        view = Lookup.of(n)
        x = self.env[view.x]
        if n in self.maps:
            self._read(n, view, x)
        noisy = self.noise.disturb(x, view.bits, view.lsbs)
        return LOOKUP(noisy, view.tables, view.which, view.bits, view.lsbs)

    def _read(self, n: fx.Node, view: Lookup, x: Tensor) -> None:
        answered: ValueType = n.meta["type"]
        truth = (self._function(n, view, x) - answered.offset) / answered.scale
        truth = truth.reshape(len(truth), -1)
        which = view.which.expand(d.shape_of(n)).reshape(-1)
        unit = answered.scale.expand(d.shape_of(n)).reshape(-1)
        half = 1 << view.bits - 1

        def errors(at: Places, slots: Tensor, low: Tensor, high: Tensor) -> Tensor:
            tables = view.tables[which[at[1]]].double()
            first = (low + 0.5).round().clamp(-half, half - 1)
            last = (high - 0.5).round().clamp(-half, half - 1)

            def entry(r: Tensor) -> Tensor:
                return tables.gather(1, r.long() + half)

            turns = ((slots - low) / (high - low)).floor()
            inside = (slots - turns * (high - low)).round()
            answer = entry(torch.minimum(torch.maximum(inside, first), last))
            # A turn reads minus the entry, and a table is centred on its two ends.
            turned = entry(first) + entry(last) - answer
            answer = torch.where(turns.remainder(2) == 0, answer, turned)
            return (answer - truth[at].unsqueeze(1)) * unit[at[1]].unsqueeze(1)

        self.tallies[n].add(x.double() / (1 << view.lsbs), self.samples, errors)

    def _function(self, n: fx.Node, view: Lookup, x: Tensor) -> Tensor:
        """Return the function of what arrives, float64.

        It is taken within what was observed: a little beyond, the function may have a pole.
        """
        node, read = self.maps[n], view.x.meta["type"]
        low, high, column = _sample_ends(self.exact, d.input_node(node))
        low, high = low.amin(0)[column], high.amax(0)[column]
        real = torch.minimum(torch.maximum(x * read.scale + read.offset, low), high)
        answer: Tensor = d.map_of(node)(real.float())
        return answer.double()

    def receive(self, place: int, x: Tensor) -> None:
        """Tally results that do not fit their encoding."""
        t: ValueType = self.integers.results[place].meta["type"]
        unit = t.scale.expand(x.shape[1:]).reshape(-1)

        def errors(at: Places, whole: Tensor, low: Tensor, high: Tensor) -> Tensor:
            turns = ((whole - low) / (high - low)).floor()
            return turns * (high - low) * unit[at[1]].unsqueeze(1)

        self.results[place].add(x.double(), self.samples, errors)

    def found(self) -> tuple[dict[fx.Node, Overflow], list[Overflow]]:
        """Return what was tallied."""
        n_results = sum(math.prod(d.shape_of(n)) for n in self.exact.results)
        floats = {**self.inputs, **self.maps}
        places = {
            n: t.overflow(_rms(self.exact.observed[floats[n].name]), n_results)
            for n, t in self.tallies.items()
        }
        results = [
            t.overflow(_rms(self.exact.observed[n.name]), n_results)
            for n, t in zip(self.exact.results, self.results, strict=True)
        ]
        return places, results


# The places, each with the float node that it is the image of -----------------------------------


def _tally_of_input(exact: Program, node: fx.Node, image: fx.Node) -> Tally:
    t: ValueType = image.meta["type"]
    return Tally(_ends(exact, node, t, 1, t.low, t.high))


def _tally_of_lookup(exact: Program, node: fx.Node, image: fx.Node, noise: float) -> Tally:
    view = Lookup.of(image)
    half = 1 << view.bits - 1
    t: ValueType = view.x.meta["type"]
    ends = _ends(exact, d.input_node(node), t, 1 << view.lsbs, -half, half - 1)
    weight = node.meta.get("sensitivity")
    return Tally(ends, noise, None if weight is None else weight.double())


def _tally_of_result(exact: Program, node: fx.Node, image: fx.Node) -> Tally:
    # The client reads a bit more than the encoding has.
    bits, t = Round.of(image).bits, image.meta["type"]
    variance = float(exact.observed[node.name].double().var().clamp_min(1e-24))
    weight = torch.full(d.shape_of(node), 1 / variance, dtype=torch.float64)
    return Tally(_ends(exact, node, t, 1, -(1 << bits), (1 << bits) - 1), weight=weight)


def _ends(
    exact: Program, node: fx.Node, t: ValueType, units: int, least: int, greatest: int
) -> Ends:
    """Return the ends of the range of a float node's image, in so many units of its integers."""
    low, high = least - 0.5, greatest + 0.5
    step = t.scale * units
    if "ends_without" in node.meta:
        fold, inward = node.meta["ends_without"]
    else:
        fold, inward = _inward(exact, node, t.offset + step * low, t.offset + step * high)
    inward = inward / step.abs()
    return Ends(low, high, fold, torch.where(step < 0, inward.flip(1), inward))


def _inward(
    exact: Program, node: fx.Node, low_end: Tensor, high_end: Tensor
) -> tuple[Tensor, Tensor]:
    """Let the room between the calibrated values and an end be a part of the calibrated range."""
    low, high, column = _sample_ends(exact, node)
    bottom, top = low.amin(0), high.amax(0)
    fold = fold_numbers(len(low))
    least, greatest = ends_without(low, high, fold)
    span = top - bottom
    shorter = ((span - (greatest - least)) / span.clamp_min(1e-30))[:, column]
    below = bottom[column] - torch.minimum(low_end, high_end)
    above = torch.maximum(low_end, high_end) - top[column]
    inward = [
        (least - bottom)[:, column] + shorter * below,
        (top - greatest)[:, column] + shorter * above,
    ]
    return fold, torch.stack(inward, 1)


def _sample_ends(exact: Program, node: fx.Node) -> tuple[Tensor, Tensor, Tensor]:
    return sample_ends(exact, node, lambda n: n.meta["classes"])


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())

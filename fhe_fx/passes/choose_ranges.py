"""Choose the range of every look-up for the least mean error over the calibration samples.

Exact in float: only `node.meta["range"]` is set, on the nodes that maps read. A narrow range has
narrow slots; a value beyond its end wraps, and reads what the table holds at the other end, turned
around. For a square that is nearly right and for other tables it may not be, so each end of each
range is tried at several places, wrapped values and the noise of bootstraps included.

The greatest values seen decide where a range ends, so among them hardly any lies outside. Each
sample is therefore tried in the range that the others lead to (`node.meta["ends_without"]`, which
the report's estimate of overflow reads as well), and the classes of a node share what they show of
rare values: calibrated samples alone would have every end too close.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.classes import Classes, find_classes
from fhe_fx.quant.left_out import fold_numbers
from fhe_fx.quant.noise import noise_in_slots, p_error_of
from fhe_fx.quant.range_search import RangeSearch
from fhe_fx.quant.ranges import sample_ends
from fhe_fx.quant.rounded import rounded_values
from fhe_fx.quant.sensitivity import sensitivities
from fhe_fx.quant.wrapping import LookupError

__all__ = ["ChooseRanges"]

_VALUES = 1 << 19
"""Values from which the error of the largest look-up is estimated, about."""
_LEAST = 16
"""Samples that are tried at least."""


@register
@dataclass(frozen=True)
class ChooseRanges(Pass):
    """Set the range of every node that a map reads."""

    name: ClassVar[str] = "choose-ranges"
    requires: ClassVar[frozenset[str]] = frozenset({"calibrated", "bits", "no-products"})
    gives: ClassVar[frozenset[str]] = frozenset({"ranges"})

    rooms: tuple[float, ...] = (-0.1, -0.05, 0.0, 0.03, 0.07, 0.13, 0.25, 0.4, 0.7)
    """How far beyond the observed range an end may lie, in parts of that range."""
    room: float = 0.03
    """How far it lies where no place is better: before a step, no derivative weighs errors."""
    shared: float = 4.0
    """Weight of the mean error of all classes of a node beside a class's own, which has few
    samples that show what is rare."""
    rarer: float = 1.25
    """Values are also tried this much farther from the median: there are rarer ones to come."""
    weight_of_rarer: float = 0.03
    """Weight of the errors at those."""

    def run(self, program: Program) -> bool:
        """Search the ends of each range, by class."""
        sources = list(dict.fromkeys(d.input_node(n) for n in program.maps()))
        if not sources:
            return False
        classes = find_classes(program)
        evidence = self._evidence(program, classes, sources)
        for reader in program.maps():  # the report weighs by it what stays outside
            squares = evidence.gradients[reader.name].square()
            reader.meta["sensitivity"] = squares[:, : squares.shape[1] // 2].mean((0, 1))
        for source in sources:
            self._search(program, classes, evidence, source)
        return False

    def _evidence(self, program: Program, classes: Classes, sources: list[fx.Node]) -> _Evidence:
        size = max(math.prod(d.shape_of(n)) for n in sources)
        step = max(1, len(program.samples) // max(_LEAST, _VALUES // size))
        samples = program.samples[::step]
        inputs = [torch.stack(values) for values in zip(*program.samples, strict=True)]
        medians = [values.median(0).values for values in inputs]
        rarer = [
            tuple(m + self.rarer * (x - m) for x, m in zip(sample, medians, strict=True))
            for sample in samples
        ]
        weight = torch.ones(2 * len(samples))
        weight[len(samples) :] = self.weight_of_rarer
        samples = [*samples, *rarer]
        names = {n.name for n in sources}
        fold = fold_numbers(len(program.samples), step)
        return _Evidence(
            program.values(samples, names),
            rounded_values(program, classes, samples, names),
            sensitivities(program, samples),
            weight,
            fold,
            fold[::step],
        )

    def _search(
        self, program: Program, classes: Classes, evidence: _Evidence, source: fx.Node
    ) -> None:
        """Set the range, and by how much less it would reach without some of the samples."""
        index = classes.of[source]
        exact, rounded = evidence.exact[source.name], evidence.rounded[source.name]
        readers = [reader for reader in source.users if d.is_map(reader)]
        gradients = [evidence.gradients[reader.name] for reader in readers]
        if len(readers) == 1:  # only how large an error becomes matters, and one draw can say that
            gradients = [gradients[0].square().mean(0, keepdim=True).sqrt()]
        errors = [
            LookupError(
                d.map_of(reader),
                exact,
                rounded,
                index,
                int(reader.meta["lookup_bits"]),
                _p_error_of_mean(program, reader),
                gradient,
                len(exact) // 2,
                source.op == "placeholder",
            )
            for reader, gradient in zip(readers, gradients, strict=True)
        ]

        low, high, column = sample_ends(program, source, classes.of.__getitem__)

        def squares_of(low: Tensor, high: Tensor, which: Tensor, is_far: Tensor) -> Tensor:
            # Readers of one value err together: their errors add before they are squared.
            ends = low[:, column], high[:, column]
            error = functools.reduce(torch.add, [e.of(*ends, which, is_far) for e in errors])
            return error.square_().mean(0)

        values = rounded.flatten(1).float()
        search = RangeSearch(
            squares_of,
            column,
            values,
            evidence.weight,
            evidence.fold_of_values,
            low,
            high,
            evidence.fold,
        )
        ends, others = search.ends(self.rooms, self.room, self.shared)
        source.meta["range"] = ends[0][column], ends[1][column]
        inward = torch.stack([others[:, 0] - ends[0], ends[1] - others[:, 1]], 1)
        source.meta["ends_without"] = evidence.fold, inward[..., column].float()


def _p_error_of_mean(program: Program, reader: fx.Node) -> float:
    """Return how often the mean of its readings would err, were it one reading."""
    noise = noise_in_slots(program.options.chosen_p_error)
    return p_error_of(noise / math.sqrt(int(reader.meta.get("readings", 1))))


@dataclass(frozen=True)
class _Evidence:
    """The samples, and rarer ones, as a look-up meets them; each `[n_samples, *shape]`, by node."""

    exact: dict[str, Tensor]
    rounded: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weight: Tensor
    """`[n_samples]`."""
    fold: Tensor
    """Of each of the program's samples, of which the first half here are every so many."""
    fold_of_values: Tensor
    """Of each of that half."""

"""How far results move when what a look-up reads is rounded, or met by noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fhe_fx.ir import dialect as d
from fhe_fx.quant.classes import find_classes
from fhe_fx.quant.noise import lookup_variance
from fhe_fx.quant.ranges import class_ends
from fhe_fx.quant.sensitivity import sensitivities
from fhe_fx.quant.wrapping import LookupError

if TYPE_CHECKING:
    from fhe_fx.ir.program import Program

__all__ = ["lookup_responses", "result_response"]

_BITS, _P_ERROR = 9, 0.8
"""The look-up that is tried: fine enough that its error is proportional to the width of a slot."""
_ROOM = 0.1
"""How far beyond the observed range it reads, in parts of it: many deviations, so nothing wraps."""
_VALUES, _LEAST = 1 << 18, 8
"""Values from which the response of the largest look-up is estimated, about; samples, at least."""


def lookup_responses(program: Program) -> dict[str, float]:
    """Return the variance that each look-up adds to the results, for one of what it reads.

    Args:
        program: with observed values, and no products.

    Returns:
        For every map, by node name: the mean square error of the results, in parts of their
        variance, divided by the variance of the map's input about its true value, in parts of the
        square of the input's observed range.
    """
    maps = program.maps()
    if not maps:
        return {}
    size = max(math.prod(d.shape_of(n)) for n in maps)
    samples = program.samples[:: max(1, len(program.samples) // max(_LEAST, _VALUES // size))]
    classes = find_classes(program)
    sources = {d.input_node(n) for n in maps}
    values = program.values(samples, {s.name for s in sources})
    gradients = sensitivities(program, samples)
    variance = lookup_variance(_BITS, _P_ERROR) * (1 + 2 * _ROOM) ** 2
    n_results = sum(math.prod(d.shape_of(n)) for n in program.results)
    found = {}
    for n in maps:
        source = d.input_node(n)
        index = classes.of[source]
        low, high = class_ends(program, source, classes.of.__getitem__, classes.n_classes)
        room = _ROOM * (high - low)
        exact = values[source.name]
        reader = LookupError(
            d.map_of(n), exact, exact, index, _BITS, _P_ERROR, gradients[n.name], len(exact),
            source.op == "placeholder",
        )  # fmt: skip
        one_range = torch.zeros(len(exact), dtype=torch.int64)
        error = reader.of((low - room)[index][None], (high + room)[index][None], one_range)
        found[n.name] = float(error.square().sum(-1).mean() / variance / n_results)
    return found


def result_response(program: Program) -> float:
    """Return the variance that rounding adds to the results, for one of the squared ranges.

    Args:
        program: with observed values.

    Returns:
        The mean over all numbers that are returned of the square of the range of their class, in
        parts of the variance of their result.
    """
    classes = find_classes(program)
    n_results = sum(math.prod(d.shape_of(n)) for n in program.results)
    total = 0.0
    for node in program.results:
        low, high = class_ends(program, node, classes.of.__getitem__, classes.n_classes)
        span = (high - low)[classes.of[node]]
        variance = float(program.observed[node.name].double().var().clamp_min(1e-24))
        total += float(span.square().sum()) / variance
    return total / max(1, n_results)

"""Shift the channels of a sum that look-ups read so that the values of each lie around zero.

Exact to float rounding: what is added to the sum, its tables take away again. Channels that meet in
one accumulator have one scale and one range, and look-ups one width of slots; where their values
lie around different centres, the range has to hold all of those. In a product of a stream and a
reciprocal deviation, (a + b / s - m)^2 with the channel's own deviation s, the centres lie tens
of times farther apart than the values of any channel reach. Adding a known number costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import compact, composed, elementwise
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.classes import Classes, find_classes

__all__ = ["CentreSums"]

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class CentreSums(Pass):
    """Insert shifts by a number for each channel, the last dimension, between sums and maps."""

    name: ClassVar[str] = "centre-sums"
    requires: ClassVar[frozenset[str]] = frozenset({"calibrated", "fused", "no-products"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    least_gain: float = 0.25
    """Bits by which ranges must become narrower, on average over the elements."""
    least_channels: int = 16
    """From how many channels on; whether fewer, as a softmax's pairs, gain was not measured."""

    def run(self, program: Program) -> bool:
        """Shift every sum that gains enough, and let all of its maps read what is shifted."""
        classes = find_classes(program)
        gaining = [
            (node, centre)
            for node in program.calls(d.ADD, d.SUB)
            if any(map(d.is_map, node.users)) and d.shape_of(node)[-1:] >= (self.least_channels,)
            for centre, gain in [_centre(program, classes, node)]
            if gain >= self.least_gain
        ]
        for node, centre in gaining:
            readers = [u for u in node.users if d.is_map(u)]
            uncentre = elementwise((aten.add.Tensor, (centre,), {}))
            shifted = program.before(readers[0], self, node).shift(node, -centre)
            for reader in readers:
                function = composed(uncentre, d.map_of(reader))
                name = str(reader.target).rstrip("0123456789").rstrip("_")
                program.replace(reader, program.before(reader, self).map(shifted, function, name))
        return bool(gaining)


def _centre(program: Program, classes: Classes, node: fx.Node) -> tuple[Tensor, float]:
    """Return the middle of what each channel was seen to take, and the bits that are saved by it.

    The first has the dimensions of the node, of size one but for the last.
    """
    values = program.observed[node.name].double()
    channels = values.flatten(0, -2)
    centre = compact((channels.amin(0) + channels.amax(0)) / 2)
    centre = centre.view((1,) * (values.dim() - 2) + (-1,))
    widths = []
    for x in (values, values - centre):
        low, high = classes.extremes(node, x)
        widths.append((high - low)[classes.of[node]].clamp_min(1e-30))
    return centre, float((widths[0] / widths[1]).log2().mean())

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
from fhe_fx.ir.build import compact
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.passes.fuse_maps import inlined
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
    """From how many channels on: of fewer, each would be centred by few calibrated values."""

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
            shifted = program.before(readers[0], self, node).shift(node, -centre)
            for reader in readers:
                function = _uncentred(d.map_of(reader), centre)
                name = str(reader.target).rstrip("0123456789").rstrip("_")
                program.replace(reader, program.before(reader, self).map(shifted, function, name))
        return bool(gaining)


def _centre(program: Program, classes: Classes, node: fx.Node) -> tuple[Tensor, float]:
    """Return the middle of what each channel was seen to take, and the bits that are saved by it.

    The first has the dimensions of the node, of size one but for the last.
    """
    values = program.observed[node.name].double()
    low, high = values.amin(0), values.amax(0)
    low, high = (end.reshape(-1, end.shape[-1]) for end in (low, high))
    centre = compact((low.amin(0) + high.amax(0)) / 2)
    of = classes.of[node].reshape(low.shape)
    before = _widths(low, high, of)
    after = _widths(low - centre, high - centre, of)
    gain = float((before / after).log2().mean())
    return centre.view((1,) * (values.dim() - 2) + (-1,)), gain


def _widths(low: Tensor, high: Tensor, of: Tensor) -> Tensor:
    """Return the width of the range of each element's class."""
    own, column = torch.unique(of, return_inverse=True)
    index = column.reshape(-1)
    ends = torch.full((2, len(own)), -torch.inf, dtype=torch.float64)
    ends[0].scatter_reduce_(0, index, -low.reshape(-1), "amax")
    ends[1].scatter_reduce_(0, index, high.reshape(-1), "amax")
    return ends.sum(0).clamp_min(1e-30)[column]


def _uncentred(function: fx.GraphModule, centre: Tensor) -> fx.GraphModule:
    """Return x -> function(x + centre)."""
    holder, graph = torch.nn.Module(), fx.Graph()

    def hold(value: Tensor) -> fx.Node:
        name = f"c{sum(1 for _ in holder.buffers())}"
        holder.register_buffer(name, value.clone())
        return graph.get_attr(name)

    x = graph.call_function(aten.add.Tensor, (graph.placeholder("x"), hold(centre)))
    graph.output(inlined(graph, function, x, hold))
    return fx.GraphModule(holder, graph)

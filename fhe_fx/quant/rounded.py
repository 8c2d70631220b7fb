"""The values of a float program as look-ups will see them: rounded, before any integer is made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.quant.tables import slot_mean

if TYPE_CHECKING:
    from fhe_fx.ir.program import Program
    from fhe_fx.quant.classes import Classes

__all__ = ["rounded_values"]


def rounded_values(
    program: Program,
    classes: Classes,
    samples: Sequence[tuple[Tensor, ...]],
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Run samples with every input, and every value that a map reads, rounded to its slots.

    A slot is the range divided by 2**input_bits or 2**lookup_bits: the range that `choose-ranges`
    chose, or else what the class was observed to take. Inputs are no finer than the weights that
    read them, whose own rounding errs as much in what they sum. A map answers with its mean over
    the slot, as its table will. Where the slots begin is drawn at random: it depends on ranges that
    later passes choose, and a row that happens to be met exactly should not pass for one that is
    met well.

    Args:
        program: with observed values.
        classes: of its elements.
        samples: values of the inputs.
        names: nodes whose values are wanted; all without it.

    Returns:
        Value of every such node, `[n_samples, *shape]`, by node name.
    """
    options = program.options

    def slots(node: fx.Node, n_bits: int) -> _Slots:
        low, high = classes.extremes(node, program.observed[node.name])
        index = classes.of[node]
        low, high = node.meta.get("range", (low[index], high[index]))
        return _Slots(low, high, n_bits)

    bits = min(options.input_bits, options.weight_bits)
    inputs = {n: slots(n, bits) for n in program.placeholders if not d.is_clear(n)}
    read = {
        n: slots(d.input_node(n), n.meta.get("lookup_bits", options.lookup_bits))
        for n in program.maps()
    }
    runner = _Rounder(program.module, inputs | read, names)
    runner.generator.manual_seed(options.seed)
    with torch.no_grad():
        runner.run(*program.stacked(samples))
    return runner.found


@dataclass(frozen=True)
class _Slots:
    """The slots of every element of a node."""

    low: Tensor
    high: Tensor
    n_bits: int

    @property
    def width(self) -> Tensor:
        width: Tensor = (self.high - self.low) / 2**self.n_bits
        return width.clamp_min(1e-30)

    def rounded(self, value: Tensor, generator: torch.Generator) -> Tensor:
        """Return the middle of each value's slot."""
        start = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        return ((value.double() / self.width - start).round() + start) * self.width

    def answered(self, function: fx.GraphModule, centre: Tensor) -> Tensor:
        """Return the mean of a function over each slot; beyond its domain, as at its end."""
        found = slot_mean(function, centre, self.width)
        if not bool(found.isfinite().all()):
            inside = torch.minimum(torch.maximum(centre, self.low), self.high)
            found = torch.where(found.isfinite(), found, slot_mean(function, inside, self.width))
        return found.float()


class _Rounder(BatchInterpreter):
    def __init__(
        self, module: fx.GraphModule, slots: dict[fx.Node, _Slots], names: Collection[str] | None
    ) -> None:
        super().__init__(module)
        self.slots, self.names = slots, names
        self.generator = torch.Generator()
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if d.is_map(n):
            slots = self.slots[n]
            centre = slots.rounded(self.env[d.input_node(n)], self.generator)
            result: Any = slots.answered(d.map_of(n), centre)
        else:
            result = super().run_node(n)
            if n in self.slots:
                result = self.slots[n].rounded(result, self.generator).float()
        if d.is_encrypted(n) and (self.names is None or n.name in self.names):
            self.found[n.name] = result
        return result

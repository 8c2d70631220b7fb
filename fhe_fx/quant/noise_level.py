"""How much noise of look-ups' answers arrives where the next look-up reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import GATE, LINEAR, LOOKUP, ROUND, SCALE, SHIFT
from fhe_fx.quant.classes import absorbed_scales, find_classes, is_exact_scale
from fhe_fx.quant.lookup_cost import cost_table, uses_up_a_size

if TYPE_CHECKING:
    from torch import fx

    from fhe_fx.ir.program import Program
    from fhe_fx.quant.classes import Classes

__all__ = [
    "NoiseLevel",
    "WholeWeights",
    "behind_look_ups",
    "bits_to_spare",
    "greatest_weight",
    "squared_norms",
]


_MOST_WHERE_USED_UP = 4.5
"""log2 of the greatest norm for which circuits have cost there what the table says."""


def behind_look_ups(program: Program) -> set[fx.Node]:
    """Return the nodes that look-ups answered, or that are made of answers by affine operators."""
    found: set[fx.Node] = set()
    for node in program.encrypted():
        if _is_look_up(node) or any(n in found for n in d.operands(node)):
            found.add(node)
    return found


@dataclass(frozen=True)
class NoiseLevel:
    """By what sums multiply the noise of look-ups' answers before it is read.

    That noise is paid for: the optimizer's parameters follow from the largest of these 2-norms.
    Answers are taken as independent, as the optimizer takes them; inputs hardly have noise.
    """

    look_ups: float
    """log2 of the greatest norm where a look-up reads."""
    results: float
    """The same where a result is decrypted."""

    @staticmethod
    def of(program: Program) -> NoiseLevel:
        """Read it off a program.

        Args:
            program: of either stage. In float, with observed values, weights count as the integers
                that they will be where sums of answers fill their encodings. Factors that scales
                absorb count as one.
        """
        weights = WholeWeights(program)
        norms = squared_norms(program, weights)
        read = dict.fromkeys(d.input_node(n) for n in program.encrypted() if _is_look_up(n))
        squares = [norms[n] * weights.times(n).square() for n in read]
        greatest = max([1.0, *(float(square.max()) for square in squares)])
        results = max([1.0, *(float(norms[n].max()) for n in program.results)])
        return NoiseLevel(0.5 * math.log2(greatest), 0.5 * math.log2(results))

    def is_known(self, p_error: float) -> bool:
        """Say whether the table of costs holds for sums as noisy as these.

        Where a polynomial size is used up, it has up to norms of 2**4.5.
        """
        return not uses_up_a_size(p_error) or self.look_ups <= _MOST_WHERE_USED_UP

    def at(self, bits: int, p_error: float, result_bits: float) -> float:
        """Return log2 of the norm that counts where look-ups and results have so many bits.

        Bits by which weights in front of results are larger count as bits of results. Infinite if
        no parameters leave results so exact.
        """
        return cost_table().norm_for_results(
            bits, p_error, self.look_ups, self.results, result_bits
        )


def greatest_weight(program: Program, node: fx.Node, behind: set[fx.Node]) -> float:
    """Return the whole number that the greatest weight of a product has to be, at least.

    Args:
        program: in float.
        node: a `linear` or `scale`. Weights of sums of answers have the bits that were allotted to
            them, or the usual ones.
        behind: as `behind_look_ups` gives it.
    """
    options = program.options
    bits: float = options.weight_bits
    if node.target == LINEAR and d.input_node(node) in behind:
        bits = node.meta.get("weight_bits", options.bits_of_answers_weights)
    return math.exp2(bits - 1) - 1


def bits_to_spare(
    program: Program, behind: set[fx.Node], greatest: Mapping[fx.Node, float]
) -> float:
    """Return by how many bits weights that multiply the same answers may all be smaller.

    Rounding them then errs together as it would if each had its bits (`greatest_weight`).

    Args:
        program: in float.
        behind: as `behind_look_ups` gives it.
        greatest: the greatest weight of each product. Where it is known what rounding does to
            results (`node.meta["weight_response"]`), that counts; elsewhere the most that is known.
    """
    known = [float(n.meta["weight_response"]) for n in greatest if "weight_response" in n.meta]
    allotted = found = 0.0
    for node, weight in greatest.items():
        response = float(node.meta.get("weight_response", max(known, default=1.0)))
        allotted += response / greatest_weight(program, node, behind) ** 2
        found += response / weight**2
    return 0.5 * math.log2(allotted / found) if found else 0.0


def squared_norms(
    program: Program, weight_of: Callable[[fx.Node], Tensor]
) -> dict[fx.Node, Tensor]:
    """Return the squared 2-norm of the weights of answers in every element, by encrypted node.

    Args:
        program: of either stage.
        weight_of: the integers, float64, by which a `linear` or `scale` multiplies.
    """
    found: dict[fx.Node, Tensor] = {}
    for node in program.encrypted():
        if _is_look_up(node):
            readings = float(node.meta.get("readings", 1))  # whose sum a map will be
            found[node] = torch.full(d.shape_of(node), readings, dtype=torch.float64)
        elif node.op == "placeholder":
            found[node] = torch.zeros(d.shape_of(node), dtype=torch.float64)
        else:
            inputs = [found[n] for n in d.operands(node)]
            found[node] = _squared(program, node, inputs, weight_of)
    return found


def _squared(
    program: Program, node: fx.Node, inputs: list[Tensor], weight_of: Callable[[fx.Node], Tensor]
) -> Tensor:
    """Return the squared norm of every element of an affine node."""
    if d.is_call(node, SHIFT, ROUND):
        return inputs[0]
    if d.is_call(node, GATE):
        return inputs[0] * _greatest_factor(program, d.input_node(node, 1)) ** 2
    if d.is_call(node, d.ADD, d.SUB):
        return inputs[0] + inputs[-1]
    if d.is_call(node, SCALE):
        return inputs[0] * weight_of(node).square()
    if d.is_call(node, LINEAR):
        summed: Tensor = inputs[0] @ weight_of(node).square()
        return summed
    moved: Tensor = d.evaluate(node, *inputs)
    return moved


class WholeWeights:
    """The weights of an integer program, or what those of a float one will be."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @functools.cached_property
    def _classes(self) -> Classes:
        return find_classes(self.program)

    def __call__(self, node: fx.Node) -> Tensor:
        """Return what a `linear` or `scale` multiplies by, float64."""
        weight = d.constant(d.input_node(node, 1))
        if not weight.is_floating_point() or is_exact_scale(node):
            return weight.double()
        if node not in self._units:  # no noise arrives, or a scale takes it up
            return (weight != 0).double()
        whole: Tensor = self._relative(node) * self._units[node]
        return whole

    def unit(self, node: fx.Node) -> float:
        """Return the whole number that stands for one part of the ranges, if alone it decided."""
        greatest = max(float(self._relative(node).abs().max()), 1e-12)
        return greatest_weight(self.program, node, self._behind) / greatest

    @functools.cached_property
    def _behind(self) -> set[fx.Node]:
        return behind_look_ups(self.program)

    @functools.cached_property
    def _units(self) -> dict[fx.Node, float]:
        """By product of answers, the whole number that stands for one part of the ranges."""
        absorbed = absorbed_scales(self.program)
        products = [
            n for n in self.program.calls(LINEAR, SCALE)
            if d.input_node(n) in self._behind and n not in absorbed and not is_exact_scale(n)
        ]  # fmt: skip
        read = {n: set(self._classes.of[d.input_node(n)].unique().tolist()) for n in products}
        found: dict[fx.Node, float] = {}
        for node in products:
            if node not in found:
                together = [n for n in products if read[n] & read[node]]
                found |= dict.fromkeys(together, self._unit_of(together))
        return found

    def _unit_of(self, products: Sequence[fx.Node]) -> float:
        """Return it for products of the same answers, which have one scale."""
        relative = {n: max(float(self._relative(n).abs().max()), 1e-12) for n in products}
        return math.exp2(-bits_to_spare(self.program, self._behind, relative))

    def _relative(self, node: fx.Node) -> Tensor:
        before, after = self.range_of(d.input_node(node)), self.range_of(node)
        weight = d.constant(d.input_node(node, 1)).double()
        if node.target == SCALE:
            return weight * before / after
        return weight * before[..., :1, :].mT / after[..., :1, :]

    def range_of(self, node: fx.Node) -> Tensor:
        """Return the range that fills the encoding of the class of each element.

        That is the widest in which a look-up reads it, or in which it is returned or multiplied.
        """
        return self._widest[self._classes.of[node]]

    def times(self, source: fx.Node) -> Tensor:
        """Return by how much a look-up will multiply what it reads, to fill its encoding."""
        if source not in self._own_range:  # the multiplication stands in the program
            return torch.ones(())
        return (self.range_of(source) / self._own_range[source]).floor().clamp_min(1)

    @functools.cached_property
    def _own_range(self) -> dict[fx.Node, Tensor]:
        """The observed range of the class of each element, by node that a look-up will read."""
        return {n: self._observed(n) for n in dict.fromkeys(map(d.input_node, self.program.maps()))}

    @functools.cached_property
    def _widest(self) -> Tensor:
        of, n_classes = self._classes.of, self._classes.n_classes
        found = torch.zeros(n_classes, dtype=torch.float64)
        for n in (*self._own_range, *self.program.results):
            found.scatter_reduce_(0, of[n].reshape(-1), self._observed(n).reshape(-1), "amax")
        is_filled = found > 0
        for n in self.program.calls(LINEAR, SCALE):
            for end in (d.input_node(n), n):
                index, own = of[end].reshape(-1), self._observed(end).reshape(-1)
                found.scatter_reduce_(0, index, torch.where(is_filled[index], 0.0, own), "amax")
        return found.clamp_min(1e-12)

    def _observed(self, node: fx.Node) -> Tensor:
        low, high = self._classes.extremes(node, self.program.observed[node.name])
        return (high - low).clamp_min(1e-12)[self._classes.of[node]]


def _is_look_up(node: fx.Node) -> bool:
    return d.is_map(node) or d.is_call(node, LOOKUP)


def _greatest_factor(program: Program, factor: fx.Node) -> float:
    """Return the greatest clear integer that a gate is to take."""
    if "type" in factor.meta:
        return float(max(-factor.meta["type"].low, factor.meta["type"].high))
    return float(program.observed[factor.name].abs().max().clamp_min(1))

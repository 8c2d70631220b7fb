"""How much noise of look-ups' answers arrives where the next look-up reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import GATE, LINEAR, LOOKUP, ROUND, SCALE, SHIFT
from fhe_fx.quant.classes import find_classes

if TYPE_CHECKING:
    from torch import fx

    from fhe_fx.ir.program import Program
    from fhe_fx.quant.classes import Classes

__all__ = ["NoiseLevel", "WholeWeights", "behind_look_ups", "bits_of_weights", "squared_norms"]


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
                that they will be where sums of answers fill their encodings, and factors as one,
                since most are absorbed by scales.
        """
        norms = squared_norms(program, WholeWeights(program))
        read = [d.input_node(n) for n in program.encrypted() if _is_look_up(n)]
        greatest = max([1.0, *(float(norms[n].max()) for n in read)])
        results = max([1.0, *(float(norms[n].max()) for n in program.results)])
        return NoiseLevel(0.5 * math.log2(greatest), 0.5 * math.log2(results))

    def at(self, bits: int, result_bits: float) -> float:
        """Return log2 of the norm that counts where look-ups and results have so many bits.

        Noise must be as small beside a slot of a result as beside one of a look-up. Bits by which
        weights in front of results are larger count as bits of results.
        """
        return max(self.look_ups, self.results + result_bits - bits)


def bits_of_weights(program: Program, node: fx.Node) -> int:
    """Return the precision of weights that multiply answers, allotted to `node` or usual."""
    bits: int = node.meta.get("weight_bits", program.options.bits_of_answers_weights)
    return bits


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
        if not weight.is_floating_point():
            return weight.double()
        if node.target == SCALE:
            return (weight != 0).double()
        whole: Tensor = self._relative(node) * 2.0 ** self.doublings(node)
        return whole

    def doublings(self, node: fx.Node) -> int:
        """Return how often a weight is doubled, from parts of ranges to whole numbers."""
        greatest = max(float(self._relative(node).abs().max()), 1e-12)
        return round(math.log2((2 ** (bits_of_weights(self.program, node) - 1) - 1) / greatest))

    def _relative(self, node: fx.Node) -> Tensor:
        before, after = self.range_of(d.input_node(node)), self.range_of(node)
        weight = d.constant(d.input_node(node, 1)).double()
        return weight * before[..., :1, :].mT / after[..., :1, :]

    def range_of(self, node: fx.Node) -> Tensor:
        """Return the observed range of the class of each element."""
        low, high = self._classes.extremes(node, self.program.observed[node.name])
        return (high - low).clamp_min(1e-12)[self._classes.of[node]]


def _is_look_up(node: fx.Node) -> bool:
    return d.is_map(node) or d.is_call(node, LOOKUP)


def _greatest_factor(program: Program, factor: fx.Node) -> float:
    """Return the greatest clear integer that a gate is to take."""
    if "type" in factor.meta:
        return float(max(-factor.meta["type"].low, factor.meta["type"].high))
    return float(program.observed[factor.name].abs().max().clamp_min(1))

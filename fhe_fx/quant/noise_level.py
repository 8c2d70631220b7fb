"""How much noise of look-ups' answers arrives where the next look-up reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import GATE, LINEAR, LOOKUP, SCALE, SHIFT
from fhe_fx.quant.classes import find_classes

if TYPE_CHECKING:
    from torch import fx

    from fhe_fx.ir.program import Program
    from fhe_fx.quant.classes import Classes

__all__ = ["behind_look_ups", "log_norm_of", "squared_norms"]


def behind_look_ups(program: Program) -> set[fx.Node]:
    """Return the nodes that look-ups answered, or that are made of answers by affine operators."""
    found: set[fx.Node] = set()
    for node in program.encrypted():
        if _is_look_up(node) or any(n in found for n in d.operands(node)):
            found.add(node)
    return found


def log_norm_of(program: Program) -> float:
    """Return log2 of the greatest 2-norm of weights with which answers of look-ups are summed.

    The noise of what a look-up answers is paid for where sums multiply it before the next one: the
    optimizer's parameters follow from the largest of these norms. Answers are taken as independent,
    as the optimizer takes them; inputs hardly have noise.

    Args:
        program: of either stage. In float, with observed values, weights count as the integers that
            they will be where sums of answers fill their encodings, and factors as one, since most
            are absorbed by scales.
    """
    norms = squared_norms(program, _WholeWeights(program))
    read = [d.input_node(n) for n in program.encrypted() if _is_look_up(n)]
    greatest = max([1.0, *(float(norms[n].max()) for n in [*read, *program.results])])
    return 0.5 * math.log2(greatest)


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
    if d.is_call(node, SHIFT):
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


class _WholeWeights:
    """The weights of an integer program, or what those of a float one will be."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @functools.cached_property
    def _classes(self) -> Classes:
        return find_classes(self.program)

    def __call__(self, node: fx.Node) -> Tensor:
        weight = d.constant(d.input_node(node, 1))
        if not weight.is_floating_point():
            return weight.double()
        if node.target == SCALE:
            return torch.ones((), dtype=torch.float64)
        x = d.input_node(node)
        before, after = self._range(x), self._range(node)
        relative = weight.double() * before[..., :1, :].mT / after[..., :1, :]
        # One width serves all sums: that at which the weights of most have their bits.
        greatest = float(2 ** (self.program.options.bits_of_answers_weights - 1) - 1)
        bits = (greatest / relative.abs().amax(-2).clamp_min(1e-12)).log2()
        whole: Tensor = relative * 2.0 ** float(bits.quantile(0.75).round())
        return whole

    def _range(self, node: fx.Node) -> Tensor:
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

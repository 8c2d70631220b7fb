"""How much noise of look-ups' answers arrives where the next look-up reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import GATE, LINEAR, LOOKUP, SCALE, SHIFT

if TYPE_CHECKING:
    from torch import fx

    from fhe_fx.ir.program import Program

__all__ = ["behind_look_ups", "log_norm_of"]


def behind_look_ups(program: Program) -> set[fx.Node]:
    """Return the nodes that look-ups answered, or that are made of answers by affine operators."""
    found: set[fx.Node] = set()
    for node in program.encrypted():
        is_answer = d.is_map(node) or d.is_call(node, LOOKUP)
        if is_answer or any(n in found for n in d.operands(node)):
            found.add(node)
    return found


def log_norm_of(program: Program) -> float:
    """Return log2 of the greatest 2-norm of weights with which answers of look-ups are summed.

    The noise of what a look-up answers is paid for where sums multiply it before the next one: the
    optimizer's parameters follow from the largest of these norms. Answers are taken as independent,
    as the optimizer takes them; inputs hardly have noise.

    Args:
        program: of either stage. In float, weights count as integers of the bits that weights of
            answers have, and factors as one, since most are absorbed by scales.
    """
    found: dict[fx.Node, Tensor] = {}
    greatest = 1.0
    for node in program.encrypted():
        if d.is_map(node) or d.is_call(node, LOOKUP):
            greatest = max(greatest, float(found[d.input_node(node)].max()))
            found[node] = torch.ones(d.shape_of(node), dtype=torch.float64)
        elif node.op == "placeholder":
            found[node] = torch.zeros(d.shape_of(node), dtype=torch.float64)
        else:
            found[node] = _squared(program, node, [found[n] for n in d.operands(node)])
    results = [float(found[n].max()) for n in program.results]
    return 0.5 * math.log2(max(greatest, *results))


def _squared(program: Program, node: fx.Node, inputs: list[Tensor]) -> Tensor:
    """Return the squared norm of every element of an affine node."""
    if d.is_call(node, SHIFT):
        return inputs[0]
    if d.is_call(node, GATE):
        return inputs[0] * _greatest_factor(program, d.input_node(node, 1)) ** 2
    if d.is_call(node, d.ADD, d.SUB):
        return inputs[0] + inputs[-1]
    if d.is_call(node, SCALE, LINEAR):
        weight = d.constant(d.input_node(node, 1))
        if weight.is_floating_point():
            largest = float(weight.abs().max()) or 1.0
            whole = 2 ** (program.options.bits_of_answers_weights - 1) - 1
            weight = torch.ones(()) if node.target == SCALE else weight * (whole / largest)
        weight = weight.double().square()
        return inputs[0] * weight if node.target == SCALE else inputs[0] @ weight
    return d.evaluate(node, *inputs)


def _greatest_factor(program: Program, factor: fx.Node) -> float:
    """Return the greatest clear integer that a gate is to take."""
    if "type" in factor.meta:
        return float(max(-factor.meta["type"].low, factor.meta["type"].high))
    return float(program.observed[factor.name].abs().max().clamp_min(1))

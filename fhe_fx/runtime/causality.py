"""Proves on the graph which rows of a result can depend on which rows of an input."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR, MASKED_SOFTMAX, SCALE, SHIFT
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pipeline
from fhe_fx.passes.expand_matmuls import ExpandMatmuls
from fhe_fx.passes.lower_softmax import LowerSoftmax
from fhe_fx.passes.sink_pairs import SinkPairs

__all__ = ["causal_axes"]


def causal_axes(program: Program, row_axes: Sequence[int]) -> dict[int, int] | None:
    """Find, for each result, the axis along which it is causal in the rows of every input.

    Row i of a causal result depends on rows 0 to i of the inputs alone, so rows may be appended
    and dropped again. Each operator of the graph is followed, element by element, from the rows
    that were appended; constants that are zero cut the path, nothing else does.

    Args:
        program: a normalized program, before heads or squares; left as it is.
        row_axes: the axis of each input that holds its rows; all hold as many.

    Returns:
        The row axis of each result by number, or None if a result is not causal.
    """
    if any(n.meta.get("is_outside") for n in program.graph.nodes):
        return None  # what the client computes is not followed
    lengths = {d.shape_of(n)[axis] for n, axis in zip(program.placeholders, row_axes, strict=True)}
    if len(lengths) != 1:
        return None
    length = lengths.pop()
    pairs = Program(copy.deepcopy(program.module), properties=set(program.properties))
    Pipeline((LowerSoftmax(), SinkPairs(), ExpandMatmuls())).run(pairs)
    axes: dict[int, int] = {}
    candidates = [
        {a for a, n in enumerate(d.shape_of(r)) if n == length and a > 0} for r in pairs.results
    ]
    for start in range(1, length):
        reached = _reach(pairs, start, row_axes)
        if reached is None:
            return None
        for number, touched in enumerate(reached):
            candidates[number] = {
                a for a in candidates[number] if not bool(touched.narrow(a, 0, start).any())
            }
    for number, left in enumerate(candidates):
        if len(left) != 1:
            return None
        axes[number] = left.pop()
    return axes


def _reach(program: Program, start: int, row_axes: Sequence[int]) -> list[Tensor] | None:
    """Return which elements of each result depend on input rows from `start` on."""
    touched: dict[fx.Node, Tensor] = {}
    for node in program.encrypted():
        shape = d.shape_of(node)
        if node.op == "placeholder":
            axis = row_axes[program.source_of(node)]
            touched[node] = torch.zeros(shape)
            touched[node].narrow(axis, start, shape[axis] - start).fill_(1)
            continue
        inputs = [touched[n] for n in d.operands(node)]
        if d.is_map(node) or d.is_call(node, SHIFT):
            value = inputs[0]
        elif d.is_call(node, d.ADD, d.SUB, d.MUL):
            value = inputs[0] + inputs[-1]
        elif d.is_call(node, SCALE):
            value = inputs[0] * (d.constant(d.input_node(node, 1)) != 0)
        elif d.is_call(node, LINEAR):
            value = inputs[0] @ (d.constant(d.input_node(node, 1)) != 0).float()
        elif d.is_call(node, d.MATMUL, MASKED_SOFTMAX):
            return None
        elif d.is_call(node, d.EMBED):
            value = inputs[0].unsqueeze(-1).expand(shape)
        else:
            value = d.evaluate(node, *inputs)
        touched[node] = (value > 0).float()
    return [touched[r] for r in program.results]

"""Proves on the graph which rows of a result can depend on which rows of an input."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import GATE, LINEAR, MASKED_SOFTMAX, SCALE, SHIFT
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pipeline
from fhe_fx.passes.expand_matmuls import ExpandMatmuls
from fhe_fx.passes.lower_softmax import LowerSoftmax
from fhe_fx.passes.sink_pairs import SinkPairs

__all__ = ["causal_axes", "causal_axes_under", "digest_of_clear", "in_pairs"]


def in_pairs(program: Program) -> Program:
    """Return a program in which products are of two elements, so that paths can be followed.

    Args:
        program: a normalized program, before heads or squares; left as it is.
    """
    pairs = Program(copy.deepcopy(program.module), properties=set(program.properties))
    Pipeline((LowerSoftmax(), SinkPairs(), ExpandMatmuls())).run(pairs)
    return pairs


def causal_axes(program: Program, row_axes: Sequence[int]) -> dict[int, int] | None:
    """Find, for each result, the axis along which it is causal in the rows of every input.

    Row i of a causal result depends on rows 0 to i of the inputs alone, so rows may be appended
    and dropped again. Each operator of the graph is followed, element by element, from the rows
    that were appended; factors that are zero cut the path, nothing else does.

    Args:
        program: a normalized program, before heads or squares; left as it is.
        row_axes: the axis of each input that holds its rows; all hold as many.

    Returns:
        The row axis of each result by number, or None if a result is not causal.
    """
    if any(n.meta.get("is_outside") for n in program.graph.nodes):
        return None  # what the client computes is known in a call alone
    return _axes(in_pairs(program), row_axes, {}, None)


def causal_axes_under(
    pairs: Program, row_axes: Sequence[int | None], clear: Mapping[int, Tensor], given: int
) -> dict[int, int] | None:
    """Find the same for one call, whose clear inputs are known: what they multiply by zero is cut.

    A product of an encrypted number and a weight that is zero in every run of this call is zero in
    float; in integers it is so up to its rounding.

    Args:
        pairs: what `in_pairs` returned.
        row_axes: as in `causal_axes`; None for clear inputs.
        clear: value of each clear input by number, as long as the circuit.
        given: rows of the call; those from there on were appended.
    """
    return _axes(pairs, row_axes, clear, given)


def digest_of_clear(row_axes: Sequence[int | None], clear: Mapping[int, Tensor], given: int) -> str:
    """Return a name of what `causal_axes_under` is asked, by the content of the clear inputs."""
    digest = hashlib.sha256(repr((list(row_axes), given)).encode())
    for number in sorted(clear):
        value = clear[number].detach().cpu().double().contiguous()
        digest.update(repr((number, tuple(value.shape))).encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _axes(
    pairs: Program,
    row_axes: Sequence[int | None],
    clear: Mapping[int, Tensor],
    given: int | None,
) -> dict[int, int] | None:
    lengths = {
        d.shape_of(n)[axis]
        for n, axis in zip(pairs.placeholders, row_axes, strict=True)
        if axis is not None
    }
    if len(lengths) != 1:
        return None
    length = lengths.pop()
    axes: dict[int, int] = {}
    candidates = [
        {a for a, n in enumerate(d.shape_of(r)) if n == length and a > 0} for r in pairs.results
    ]
    known = _clear_values(pairs, clear)
    for start in range(1, length) if given is None else [given]:
        reached = _reach(pairs, start, row_axes, known)
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


def _clear_values(pairs: Program, clear: Mapping[int, Tensor]) -> dict[fx.Node, Tensor]:
    """Compute, as the client does, what depends on clear inputs alone."""
    known: dict[fx.Node, Tensor] = {
        node: clear[number] for number, node in enumerate(pairs.placeholders) if number in clear
    }
    runner = fx.Interpreter(pairs.module)
    runner.env = {**known}
    for node in pairs.graph.nodes if known else ():
        is_constant = node.op == "get_attr"
        if node in known or not (is_constant or set(node.all_input_nodes) <= set(runner.env)):
            continue
        if node.op == "output" or (not is_constant and not node.all_input_nodes):
            continue
        runner.env[node] = runner.run_node(node)
        if not is_constant and isinstance(runner.env[node], Tensor):
            known[node] = runner.env[node]
    return known


def _reach(
    program: Program,
    start: int,
    row_axes: Sequence[int | None],
    known: Mapping[fx.Node, Tensor],
) -> list[Tensor] | None:
    """Return which elements of each result depend on input rows from `start` on."""
    # Of each element: whether it may be other than zero, and whether it depends on those rows.
    live: dict[fx.Node, Tensor] = {}
    touched: dict[fx.Node, Tensor] = {}
    for node in program.encrypted():
        if not isinstance(node.meta["val"], Tensor):
            continue  # several results of what the client computes, each known by itself
        shape = d.shape_of(node)
        if node in known:
            live[node] = (known[node] != 0).float().expand(shape)
            touched[node] = torch.zeros(shape)
            continue
        if node.op == "placeholder":
            axis = row_axes[program.source_of(node)]
            live[node], touched[node] = torch.ones(shape), torch.zeros(shape)
            assert axis is not None, "a clear input without its value"
            touched[node].narrow(axis, start, shape[axis] - start).fill_(1)
            continue
        if d.is_call(node, d.MATMUL, MASKED_SOFTMAX):
            return None
        inputs = d.operands(node)
        if d.is_call(node, d.MUL, GATE):
            x, y = inputs[0], inputs[-1]
            live[node] = live[x] * live[y]
            through = touched[x] * live[y] + live[x] * touched[y]
        else:
            is_zero_kept = not (d.is_map(node) or d.is_call(node, SHIFT, d.EMBED))
            arrived = _through(node, [live[n] for n in inputs]) > 0
            live[node] = arrived.float() if is_zero_kept else torch.ones(shape)
            through = _through(node, [touched[n] for n in inputs])
        touched[node] = (through > 0).float()
    return [touched[r] for r in program.results]


def _through(node: fx.Node, inputs: Sequence[Tensor]) -> Tensor:
    """Follow marks of elements through an affine operator or a map: positive where one arrives."""
    if d.is_map(node) or d.is_call(node, SHIFT):
        return inputs[0]
    if d.is_call(node, d.ADD, d.SUB):
        return inputs[0] + inputs[-1]
    if d.is_call(node, SCALE):
        return inputs[0] * (d.constant(d.input_node(node, 1)) != 0)
    if d.is_call(node, LINEAR):
        return inputs[0] @ (d.constant(d.input_node(node, 1)) != 0).float()
    if d.is_call(node, d.EMBED):
        return inputs[0].unsqueeze(-1).expand(d.shape_of(node))
    return d.evaluate(node, *inputs)

"""A region in float whose activations are rounded as the integers will be, and nothing else.

The pipeline is run up to its lowering to integers. Then what enters the circuit, what each look-up
reads and what it returns are rounded to their steps by nodes of the graph. Weights stay exact, and
ranges have no ends, so values neither clip nor wrap.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx

from fhe_fx.errors import PassError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program
from fhe_fx.quant.ranges import times_to_fill
from fhe_fx.runtime.region import Region

__all__ = ["fake_quantized"]

_LOWERING = "lower-to-integers"


def fake_quantized(region: Region) -> Program:
    """Return the float program of a region with roundings in it.

    Raises:
        PassError: if the region's pipeline does not assign scales before it lowers to integers.
    """
    program = copy.deepcopy(region.captured)
    region.pipeline.drop(_LOWERING).run(program)
    if "scales" not in program.properties:
        raise PassError(f"{region.name}: no pass of the pipeline assigns scales.")
    for node in [n for n in program.encrypted() if d.is_map(n)]:
        middle, step = _slots(node)
        source = d.input_node(node)
        with program.graph.inserting_before(node):
            rounded = _rounding(program, source, middle, step)
        node.replace_input_with(source, rounded)
    inputs = [n for n in program.placeholders if not d.is_clear(n)]
    for node in [*inputs, *program.maps()]:
        scale: Tensor = node.meta["scale"]
        users = list(node.users)
        with program.graph.inserting_after(_last_placeholder(program, node)):
            rounded = _rounding(program, node, torch.zeros(()), scale)
        for user in users:
            user.replace_input_with(node, rounded)
    program.module.recompile()
    return program


def _rounding(program: Program, x: fx.Node, middle: Tensor, step: Tensor) -> fx.Node:
    constants = []
    for value in (middle, step):
        name = f"rounding_{len(program.module._buffers)}"
        program.module.register_buffer(name, value.detach().clone())
        constants.append(program.graph.get_attr(name))
    node = program.graph.call_function(_round, (x, *constants))
    node.prepend(constants[0])
    node.prepend(constants[1])
    node.meta["val"] = x.meta["val"]
    return node


def _round(x: Tensor, middle: Tensor, step: Tensor) -> Tensor:
    return (((x - middle) / step).round() * step + middle).to(x.dtype)


def _last_placeholder(program: Program, node: fx.Node) -> fx.Node:
    return program.placeholders[-1] if node.op == "placeholder" else node


def _slots(node: fx.Node) -> tuple[Tensor, Tensor]:
    """Return middle and width of the slots in which a map's look-up reads its input."""
    source = d.input_node(node)
    low, high = source.meta["range"]
    lsbs = int(source.meta["width"]) - int(node.meta["lookup_bits"])
    return (low + high) / 2, source.meta["scale"].abs() / times_to_fill(source) * 2.0**lsbs

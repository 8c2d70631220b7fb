"""Lowers a captured submodule: client prefix, encrypted region, client suffix, integers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from fhe_fx.errors import CaptureError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import SCALE, SHIFT
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pipeline
from fhe_fx.passes.partition import ENCRYPTED, Partition
from fhe_fx.passes.select_heads import SelectHeads
from fhe_fx.runtime.region import Region

__all__ = ["Lowerer", "inputs_of_region", "lower_region", "run_pipeline"]

Lowerer = Callable[[Program, Pipeline], Program]
"""Returns what a pipeline makes of a captured region, which it leaves as it is."""


def run_pipeline(captured: Program, pipeline: Pipeline) -> Program:
    """Lower a copy of a region."""
    program = copy.deepcopy(captured)
    pipeline.run(program)
    return program


def lower_region(
    target: Program,
    heads: Sequence[int] | None,
    pipeline: Pipeline,
    lower: Lowerer = run_pipeline,
) -> Region:
    """Choose what of a submodule is encrypted, and lower it to integers.

    Args:
        target: the submodule, normalized, with calibration samples of its inputs; left as it is.
        heads: heads of its attention to encrypt, or None for all of it.
        pipeline: lowers the encrypted region.
        lower: how it is run; a cache may know the result.

    Raises:
        TargetError: if there are no such heads.
        CaptureError: if the region would encrypt integers.
    """
    path, options = target.name, target.options
    composed = Program(
        copy.deepcopy(target.module), name=path, options=options, properties={"normal"}
    )
    if heads is None:
        clients = _clients_share(composed)
        for node in composed.graph.nodes:
            is_call = node.op in {"call_function", "call_module"}
            is_clients = node in clients or node.meta.get("is_outside")
            node.meta["encrypted"] = is_call and not is_clients
        if not any(n.meta["encrypted"] for n in composed.graph.nodes):
            raise CaptureError(
                f"{path} only takes rows of tables by integers, which the client does in the "
                f"clear. Choose a submodule that computes something with them."
            )
        composed.properties.add("annotated")
        Pipeline((Partition(),)).run(composed)
    else:
        Pipeline((SelectHeads(tuple(heads)), Partition())).run(composed)
    captured = Program(
        composed.module.get_submodule(ENCRYPTED),  # type: ignore[arg-type]
        name=path if heads is None else f"{path} heads {','.join(map(str, heads))}",
        options=options,
        samples=inputs_of_region(composed.module, target.samples),
        properties={"captured", "normal"},
    )
    for node in captured.placeholders:  # the region begins at them
        for key in ("clear", "is_outside"):
            node.meta.pop(key, None)
    program = lower(captured, pipeline)
    shapes = tuple(d.shape_of(n) for n in target.placeholders)
    return Region(path, target, composed.module, captured, program, pipeline.dumping(None), shapes)


def _clients_share(program: Program) -> set[fx.Node]:
    """Return what the client computes of a submodule that is given integers: the embedding.

    No ciphertext can choose a row of a table, so the client needs the table. What it would have to
    know besides to begin later, such as the weights of a norm, stays with the server: the share
    ends with the sum of the rows.
    """
    share = {n for n in program.placeholders if not n.meta["val"].is_floating_point()}
    for node in program.graph.nodes:
        moves_or_adds = d.is_call(node, d.EMBED, d.ADD, d.SUB, SHIFT, *d.STRUCTURAL)
        is_scaled = d.is_call(node, SCALE) and d.constant(d.input_node(node, 1)).numel() == 1
        if (moves_or_adds or is_scaled) and share.issuperset(d.operands(node)):
            share.add(node)
    return share


class _Prefix(fx.Interpreter):
    """Runs the client's prefix and returns what enters the encrypted region."""

    def inputs(self, sample: Sequence[Tensor]) -> tuple[Tensor, ...]:
        placeholders = (n for n in self.graph.nodes if n.op == "placeholder")
        self.env = dict(zip(placeholders, sample, strict=True))
        for node in self.graph.nodes:
            if node.target == ENCRYPTED:
                return tuple(self.env[n] for n in node.args)
            if node.op != "placeholder":
                self.env[node] = self.run_node(node)
        raise AssertionError("partition made no encrypted part")


def inputs_of_region(
    composed: fx.GraphModule, samples: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, ...]]:
    """Return what enters the encrypted part of a partitioned graph, for each sample.

    Raises:
        CaptureError: if integers enter it.
    """
    with torch.no_grad():
        found = [_Prefix(composed).inputs(sample) for sample in samples]
    if any(not x.is_floating_point() for inputs in found for x in inputs):
        raise CaptureError(
            "The region reads integers that depend on the model's input; only floating-point "
            "tensors can be encrypted. Choose a submodule behind the embedding."
        )
    return found

"""An integer program as JSON and safetensors, and back: nothing in it is executed to read it.

The dialect has a dozen operators, so the file is a list of calls by name. It holds the weights of
the encrypted part and belongs to the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, fx

from fhe_fx.errors import ArtifactError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program

__all__ = ["GRAPH_ENTRIES", "graph_from_entries", "graph_to_entries"]

GRAPH_ENTRIES = ("program.json", "program.safetensors")
"""Entries of server.zip that hold the integer program."""

_OPERATORS = {str(op): op for op in d.INTEGER_OPS}


def graph_to_entries(program: Program) -> dict[str, bytes]:
    """Write an integer program."""
    nodes = [n for n in program.graph.nodes if n.op != "get_attr"]
    used = {a for n in nodes for a in n.all_input_nodes if a.op == "get_attr"}
    names = {n: f"c{i}" for i, n in enumerate(n for n in program.graph.nodes if n in used)}
    tensors = {name: d.constant(n).contiguous().clone() for n, name in names.items()}
    numbers = {n: i for i, n in enumerate(nodes)}

    def written(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return {"constant": names[arg]} if arg in names else {"node": numbers[arg]}
        if isinstance(arg, (list, tuple)):
            return [written(a) for a in arg]
        assert arg is None or isinstance(arg, (bool, int)), arg
        return arg

    calls = []
    for n in nodes:
        op = str(n.target) if n.op == "call_function" else n.op
        args = written(n.args) if n.op != "placeholder" else []
        assert not n.kwargs, f"{n} has keyword arguments"
        calls.append({"op": op, "args": args})
    text = json.dumps({"name": program.name, "nodes": calls})
    return dict(zip(GRAPH_ENTRIES, (text.encode(), safetensors.save(tensors)), strict=True))


def graph_from_entries(entries: Mapping[str, bytes]) -> Program:
    """Read what `graph_to_entries` wrote.

    Returns:
        A program that the reference backend runs; it has no types, which the codec holds.

    Raises:
        ArtifactError: if it is malformed.
    """
    try:
        written = json.loads(entries[GRAPH_ENTRIES[0]])
        tensors = safetensors.load(entries[GRAPH_ENTRIES[1]])
        module = _build(written["nodes"], tensors)
        return Program(module, name=str(written["name"]), properties={"integer"})
    except Exception as error:  # whatever the bytes hold, the answer is one sentence
        raise ArtifactError(
            f"server.zip holds a program that cannot be read ({type(error).__name__}: {error}). "
            f"Export the region again."
        ) from error


def _build(calls: list[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    root, graph = torch.nn.Module(), fx.Graph()
    for name, value in tensors.items():
        root.register_buffer(name, value)
    made: list[fx.Node] = []
    constants: dict[str, fx.Node] = {}

    def read(arg: Any) -> Any:
        if isinstance(arg, list):
            return [read(a) for a in arg]
        if not isinstance(arg, dict):
            return arg
        if "node" in arg:
            return made[arg["node"]]
        name = arg["constant"]
        if name not in constants:
            constants[name] = graph.get_attr(name)
        return constants[name]

    for number, call in enumerate(calls):
        args = tuple(read(call["args"]))
        if call["op"] == "placeholder":
            made.append(graph.placeholder(f"input_{number}"))
        elif call["op"] == "output":
            made.append(graph.output(tuple(args[0])))
        else:
            made.append(graph.call_function(_OPERATORS[call["op"]], args))
    graph.lint()
    return fx.GraphModule(root, graph)

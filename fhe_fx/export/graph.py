"""Graphs as JSON and safetensors, and back: nothing in a file is executed to read it.

The dialect has a dozen operators, so a graph is a list of calls by name. The integer program holds
the weights of the encrypted part and belongs to the server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from safetensors import torch as safetensors
from torch import Tensor, fx
from torch._ops import OpOverload

from fhe_fx.errors import ArtifactError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program

__all__ = [
    "GRAPH_ENTRIES",
    "describe",
    "graph_from_entries",
    "graph_to_entries",
    "operator_of",
    "rebuild",
]

Operator = Callable[..., Any]

GRAPH_ENTRIES = ("program.json", "program.safetensors")
"""Entries of server.zip that hold the integer program."""

_OPERATORS: dict[str, Operator] = {str(op): op for op in d.INTEGER_OPS}


def operator_of(name: str) -> Operator:
    """Return an operator of the integer stage by the name that `describe` wrote."""
    return _OPERATORS[name]


def graph_to_entries(program: Program) -> dict[str, bytes]:
    """Write an integer program."""
    tensors: dict[str, Tensor] = {}
    nodes = describe(program.module, tensors)["nodes"]
    text = json.dumps({"name": program.name, "nodes": nodes})
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
        module = rebuild({"nodes": written["nodes"]}, tensors, operator_of)
        return Program(module, name=str(written["name"]), properties={"integer"})
    except Exception as error:  # whatever the bytes hold, the answer is one sentence
        raise ArtifactError(
            f"server.zip holds a program that cannot be read ({type(error).__name__}: {error}). "
            f"Export the region again."
        ) from error


def describe(
    module: fx.GraphModule,
    tensors: dict[str, Tensor],
    prefix: str = "",
    left_out: Collection[str] = (),
) -> dict[str, Any]:
    """Describe a graph in terms of JSON.

    Args:
        module: calls operators, and modules that are graphs themselves.
        tensors: receives its constants.
        prefix: of their names.
        left_out: names of modules that are called and not described.

    Returns:
        "nodes", a list of calls; "modules", what is called in them by name.

    Raises:
        ArtifactError: if an argument is neither a number, a word nor a tensor.
    """
    nodes = [n for n in module.graph.nodes if n.op != "get_attr"]
    used = {a for n in nodes for a in n.all_input_nodes if a.op == "get_attr"}
    constants = [n for n in module.graph.nodes if n in used]
    names = {n: f"{prefix}c{i}" for i, n in enumerate(constants)}
    tensors |= {name: d.constant(n).contiguous().clone() for n, name in names.items()}
    numbers = {n: i for i, n in enumerate(nodes)}

    def written(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return {"constant": names[arg]} if arg in names else {"node": numbers[arg]}
        if isinstance(arg, (list, tuple)):
            return [written(a) for a in arg]
        if arg is None or isinstance(arg, (bool, int, float, str)):
            return arg
        if isinstance(arg, torch.dtype):
            return {"dtype": str(arg).removeprefix("torch.")}
        raise ArtifactError(f"An argument of type {type(arg).__name__} cannot be written: {arg!r}.")

    calls, modules = [], {}
    for n in nodes:
        call = {"op": n.op, "args": written(n.args) if n.op != "placeholder" else []}
        if n.op == "call_function":
            call["op"] = str(n.target) if isinstance(n.target, OpOverload) else n.target.__name__
        elif n.op == "call_module":
            name = call["module"] = str(n.target)
            if name not in left_out:
                inner = cast(fx.GraphModule, module.get_submodule(name))
                modules[name] = describe(inner, tensors, f"{prefix}{name}.")
        if n.kwargs:
            call["kwargs"] = {k: written(v) for k, v in n.kwargs.items()}
        calls.append(call)
    return {"nodes": calls, "modules": modules}


def rebuild(
    described: Mapping[str, Any], tensors: Mapping[str, Tensor], operator: Callable[[str], Operator]
) -> fx.GraphModule:
    """Build a graph again from what `describe` returned.

    Args:
        described: nodes and modules; a module that was left out is one that cannot be called. A
            call may have a "name", which its node then has.
        tensors: constants by the names given to `describe`.
        operator: returns the operator of a name, or raises.
    """
    root, graph = torch.nn.Module(), fx.Graph()
    made: list[fx.Node] = []
    constants: dict[str, fx.Node] = {}

    def read(arg: Any) -> Any:
        if isinstance(arg, list):
            return [read(a) for a in arg]
        if not isinstance(arg, dict):
            return arg
        if "node" in arg:
            return made[arg["node"]]
        if "dtype" in arg:
            return _dtype(arg["dtype"])
        name = arg["constant"]
        if name not in constants:
            attribute = name.rpartition(".")[2]
            root.register_buffer(attribute, tensors[name])
            constants[name] = graph.get_attr(attribute)
        return constants[name]

    for number, call in enumerate(described["nodes"]):
        args = tuple(read(call["args"]))
        if call["op"] == "placeholder":
            made.append(graph.placeholder(call.get("name", f"input_{number}")))
        elif call["op"] == "output":
            made.append(graph.output(tuple(args[0]) if isinstance(args[0], list) else args[0]))
        elif call["op"] == "call_module":
            name = call["module"]
            inner = described["modules"].get(name)
            root.add_module(
                name, torch.nn.Module() if inner is None else rebuild(inner, tensors, operator)
            )
            made.append(graph.call_module(name, args))
        else:
            kwargs = {k: read(v) for k, v in call.get("kwargs", {}).items()}
            target = operator(call["op"])
            made.append(graph.create_node("call_function", target, args, kwargs, call.get("name")))
    graph.lint()
    return fx.GraphModule(root, graph)


def _dtype(name: object) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"{name!r} is no type of numbers.")
    return found

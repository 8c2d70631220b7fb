"""Split a graph in three: client prefix, encrypted region, client suffix.

Exact: the composed module computes what the graph did, operator by operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx

from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["ENCRYPTED", "PREFIX", "SUFFIX", "Partition"]

PREFIX, ENCRYPTED, SUFFIX = "client_prefix", "encrypted", "client_suffix"


@register
@dataclass(frozen=True)
class Partition(Pass):
    """Move the marked nodes, those before and those after into three submodules."""

    name: ClassVar[str] = "partition"
    requires: ClassVar[frozenset[str]] = frozenset({"annotated"})
    gives: ClassVar[frozenset[str]] = frozenset({"partitioned"})
    breaks: ClassVar[frozenset[str]] = frozenset({"annotated", "normal"})

    def run(self, program: Program) -> bool:
        """Replace the program's graph by one that calls the three parts."""
        nodes = [n for n in program.graph.nodes if n.op == "call_function" or n.op == "call_module"]
        region = [n for n in nodes if n.meta.get("encrypted")]
        later: set[fx.Node] = set()
        for node in nodes:  # in topological order
            if any(n in later or n.meta.get("encrypted") for n in node.all_input_nodes):
                later.add(node)
        suffix = [n for n in nodes if n in later and not n.meta.get("encrypted")]
        prefix = [n for n in nodes if n not in later and not n.meta.get("encrypted")]
        results = [n for n in program.results if n.op != "get_attr"]
        program.module = _compose(
            program, [(PREFIX, prefix), (ENCRYPTED, region), (SUFFIX, suffix)], results
        )
        return True


def _outputs_of(part: Sequence[fx.Node], results: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(part)
    return [
        n
        for n in part
        if n in results or any(u not in inside and u.op != "output" for u in n.users)
    ]


def _inputs_of(part: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(part)
    found: dict[fx.Node, None] = {}
    for node in part:
        for source in node.all_input_nodes:
            if source not in inside and source.op != "get_attr":
                found[source] = None
    return list(found)


def extract(
    module: fx.GraphModule,
    part: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
) -> fx.GraphModule:
    """Copy the nodes `part` into a module of their own, with the constants that they read."""
    root, graph = torch.nn.Module(), fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)

    def load(node: fx.Node) -> fx.Node:
        if node not in copied:
            name = str(node.target).replace(".", "_")
            root.register_buffer(name, _attribute(module, node))
            copied[node] = graph.get_attr(name)
            copied[node].meta = dict(node.meta)
        return copied[node]

    for node in part:
        if node.op == "call_module":
            name = str(node.target).replace(".", "_")
            root.add_module(name, module.get_submodule(str(node.target)))
            new = graph.call_module(name, fx.node.map_arg(node.args, load))
        else:
            new = graph.create_node(
                node.op,
                node.target,
                fx.node.map_arg(node.args, load),
                fx.node.map_arg(node.kwargs, load),
                node.name,
            )
        new.meta = dict(node.meta)
        copied[node] = new
    graph.output(tuple(copied[n] for n in outputs))
    return fx.GraphModule(root, graph)


def _attribute(module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    value: object = module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return cast(torch.Tensor, value).detach()


def _compose(
    program: Program, parts: Sequence[tuple[str, list[fx.Node]]], results: Sequence[fx.Node]
) -> fx.GraphModule:
    root, graph = torch.nn.Module(), fx.Graph()
    have: dict[fx.Node, fx.Node] = {}
    for node in program.placeholders:
        have[node] = graph.placeholder(node.name)
        have[node].meta = dict(node.meta)
    for name, part in parts:
        if not part:
            continue
        inputs, outputs = _inputs_of(part), _outputs_of(part, results)
        root.add_module(name, extract(program.module, part, inputs, outputs))
        call = graph.call_module(name, tuple(have[n] for n in inputs))
        call.meta["val"] = tuple(n.meta["val"] for n in outputs)
        for number, node in enumerate(outputs):
            have[node] = graph.call_function(_item, (call, number))
            have[node].meta = dict(node.meta)
    for node in program.results:
        if node.op == "get_attr":
            root.register_buffer(
                str(node.target).replace(".", "_"), _attribute(program.module, node)
            )
            have[node] = graph.get_attr(str(node.target).replace(".", "_"))
    graph.output(tuple(have[n] for n in program.results))
    return fx.GraphModule(root, graph)


def _item(values: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
    return values[index]

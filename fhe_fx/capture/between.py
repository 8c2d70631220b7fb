"""Cuts a region that begins and ends anywhere out of an fx graph, as a submodule of its own.

What runs encrypted is a submodule with arguments and results, since that is what can be called,
recorded and replaced. Where the region that someone studies is none, the graph is written anew so
that it is: the rest of the graph calls it where its nodes stood.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fhe_fx.capture.export import is_assertion
from fhe_fx.capture.targets import is_model_itself, resolve_targets
from fhe_fx.errors import CaptureError, TargetError, did_you_mean

__all__ = ["BETWEEN", "submodule_between", "submodules_of"]

BETWEEN = "between"
"""Name of the submodule that `submodule_between` makes, where nothing else has it."""
WHOLE = "whole"
"""Name of the submodule that holds all of a graph."""


def submodule_between(
    graph_module: fx.GraphModule, from_nodes: str | Sequence[str], to_nodes: str | Sequence[str]
) -> tuple[fx.GraphModule, str]:
    """Make a submodule of what lies between two sets of nodes, both included.

    The region holds every node that depends on one of `from_nodes` and that one of `to_nodes`
    depends on, so no value can leave it and come back. A value that is made outside of it becomes
    an argument; one that is read outside of it becomes a result, also if it is none of `to_nodes`.

    Args:
        graph_module: any fx graph (`fx.symbolic_trace`, `fhe_fx.trace`); left as it is.
        from_nodes: names of the nodes at which the region begins. An input of the graph stays
            outside; the region begins at what reads it. The path of a submodule, where the graph
            records them, or a unique suffix of it, names all its nodes.
        to_nodes: names of the nodes, or paths of the submodules, at which it ends.

    Returns:
        A graph that computes the same, and the name of the submodule in it. Both share the
        parameters of the graph that was given.

    Raises:
        TargetError: if a node does not exist (near names are named) or is of no use as an end.
        CaptureError: if an end does not depend on a start, or a start leads to no end.
    """
    graph = graph_module.graph
    starts = _named(graph, from_nodes, "from_nodes")
    ends = _named(graph, to_nodes, "to_nodes")
    for node in ends:
        if node.op in {"placeholder", "get_attr"}:
            what = "an input" if node.op == "placeholder" else "a constant"
            raise TargetError(f"to_nodes: {node.name} is {what} of the graph; nothing computes it.")
    after, before = _reached(starts, forward=True), _reached(ends, forward=False)
    _check_connected(starts, ends, after, before)
    region = [n for n in graph.nodes if n in after and n in before and n.op.startswith("call_")]
    name = _fresh(graph_module)
    return _compose(graph_module, region, after, name), name


def submodules_of(
    graph_module: fx.GraphModule, target: str | Sequence[str]
) -> tuple[fx.GraphModule, list[str]]:
    """Make submodules again of what a flat graph knows as the nodes of submodules.

    Graphs that `torch.export` writes say of each node in which submodules of the model it stood.

    Args:
        graph_module: any fx graph; left as it is.
        target: as `resolve_targets` takes it, on the graph's own submodules and those it records;
            or "", all that the graph computes.

    Returns:
        A graph that computes the same, and the paths of the targets in it. What was
        `h.0.attn` in the model is `h_0_attn`.

    Raises:
        TargetError: as `resolve_targets`.
        CaptureError: if a submodule is not one region of the graph.
    """
    if is_model_itself(target):
        whole, name = _with_submodule(graph_module, _computed(graph_module.graph), WHOLE)
        return whole, [name]
    recorded = {p for n in graph_module.graph.nodes for p in _stack(n)}
    own = {p for p, _ in graph_module.named_modules() if p}
    called = {str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"}
    if not recorded or (isinstance(target, str) and target in called):
        return graph_module, resolve_targets(graph_module, target)
    root: nn.Module = type("GraphModule", (nn.Module,), {})()
    for path in sorted(recorded | own):
        holder = root
        for name in path.split("."):
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
    names = []
    for path in resolve_targets(root, target):
        if path in called:
            names.append(path)
            continue
        region = [n for n in _computed(graph_module.graph) if path in _stack(n)]
        if not region:
            raise CaptureError(f"{path}: no node of the graph belongs to it. Choose another.")
        region = _with_between(graph_module.graph, region, path)
        graph_module, name = _with_submodule(graph_module, region, path.replace(".", "_"))
        names.append(name)
    return graph_module, names


def _with_submodule(
    whole: fx.GraphModule, region: Sequence[fx.Node], wanted: str
) -> tuple[fx.GraphModule, str]:
    """Make a convex region a submodule; return its name, the wanted one if that is free."""
    name = _fresh(whole, wanted)
    return _compose(whole, region, _reached(region, forward=True), name), name


def _computed(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that compute something."""
    return [n for n in graph.nodes if n.op.startswith("call_") and not is_assertion(n)]


def _stack(node: fx.Node) -> list[str]:
    """Return the paths of the submodules in which a node stood, where the graph records them."""
    stack: Any = node.meta.get("nn_module_stack") or {}
    return [p for p in (str(path).split("@")[0] for path, _ in stack.values()) if p]


def _with_between(graph: fx.Graph, region: Sequence[fx.Node], path: str) -> list[fx.Node]:
    """Return the region with what lies between its nodes, if that is of no other submodule."""
    inside = set(region)
    after, before = _reached(region, forward=True), _reached(region, forward=False)
    between = [n for n in graph.nodes if n in after and n in before and n not in inside]
    if others := [n for n in between if _stack(n)]:
        raise CaptureError(
            f"{path} is not one region of the graph: {', '.join(n.name for n in others[:8])} "
            f"lie between two of its nodes. Choose from_nodes and to_nodes around them."
        )
    inside.update(between)
    return [n for n in graph.nodes if n in inside]


def _named(graph: fx.Graph, names: str | Sequence[str], argument: str) -> list[fx.Node]:
    wanted = [names] if isinstance(names, str) else names
    is_list = isinstance(wanted, Sequence) and all(isinstance(n, str) for n in wanted)
    if not is_list or not wanted:
        raise TargetError(f"{argument}={names!r} is not a list of names of nodes.")
    known = {n.name: [n] for n in graph.nodes if n.op != "output"}
    paths = _nodes_of_submodules(graph)
    for name in set(wanted) - known.keys() - paths.keys():
        ends = [p for p in paths if p.endswith(f".{name}")]
        paths |= {name: paths[ends[0]]} if len(ends) == 1 else {}
    if missing := [n for n in wanted if n not in known and n not in paths]:
        hints = "".join(f"\n  {n!r}.{did_you_mean(n, list(known | paths))}" for n in missing)
        raise TargetError(
            f"{argument}: the graph has {len(known)} nodes, and {len(missing)} of the names are "
            f"none of theirs:{hints}\nprint(graph_module.graph) lists them."
        )
    return [node for n in wanted for node in known.get(n) or paths[n]]


def _nodes_of_submodules(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return the nodes that compute something in each submodule that the graph records."""
    found: dict[str, list[fx.Node]] = {}
    for node in _computed(graph):
        for path in _stack(node):
            found.setdefault(path, []).append(node)
    return found


def _reached(nodes: Iterable[fx.Node], *, forward: bool) -> set[fx.Node]:
    """Return the nodes, and all that depend on them or that they depend on."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.users if forward else node.all_input_nodes
    return found


def _check_connected(
    starts: Sequence[fx.Node],
    ends: Sequence[fx.Node],
    after: set[fx.Node],
    before: set[fx.Node],
) -> None:
    faults = [
        f"{n.name} does not depend on {' or '.join(s.name for s in starts)}"
        for n in ends
        if n not in after
    ]
    faults += [
        f"{n.name} leads to none of {', '.join(e.name for e in ends)}"
        for n in starts
        if n not in before
    ]
    if faults:
        raise CaptureError(
            f"There is no region from {', '.join(n.name for n in starts)} "
            f"to {', '.join(n.name for n in ends)}: {'; '.join(faults)}. "
            f"Choose nodes of which each end depends on a start, and each start leads to an end."
        )


def _fresh(module: nn.Module, wanted: str = BETWEEN) -> str:
    number, name = 0, wanted
    while hasattr(module, name):
        number += 1
        name = f"{wanted}_{number}"
    return name


def _compose(
    whole: fx.GraphModule, region: Sequence[fx.Node], after: set[fx.Node], name: str
) -> fx.GraphModule:
    """Write the graph anew: what does not depend on the starts, the region, what is left."""
    inside = set(region)
    arguments = dict.fromkeys(
        s for n in region for s in n.all_input_nodes if s not in inside and s.op != "get_attr"
    )
    others = [n for n in whole.graph.nodes if n not in inside and not is_assertion(n)]
    others = [n for n in others if n.op != "get_attr" or not inside.issuperset(n.users)]
    results = [n for n in region if any(u in others for u in n.users)]
    root = nn.Module()
    _keep(root, whole, others)
    extracted = _extract(whole, region, list(arguments), results)
    root.add_module(name, _Region(extracted, [_known_as(n) for n in arguments]))

    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    needed = _reached(arguments, forward=False)
    for node in others:
        if node in needed or node not in after or node.op == "placeholder":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    call = graph.call_module(name, tuple(copied[n] for n in arguments))
    for number, node in enumerate(results):
        copied[node] = _item(graph, call, number) if len(results) > 1 else call
    for node in others:
        if node not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.set_codegen(whole.graph._codegen)
    graph.lint()
    return fx.GraphModule(root, graph, type(whole).__name__)


class _Region(nn.Module):
    """Runs a graph. `torch.export` keeps no record of graph modules, and does of this.

    Node by node, so that what is traced keeps the source lines of the model.
    """

    def __init__(self, nodes: fx.GraphModule, argument_names: Sequence[str]) -> None:
        super().__init__()
        self.nodes = nodes
        self.argument_names = tuple(argument_names)  # which `clear_inputs` names

    def forward(self, *args: Any) -> Any:
        return fx.Interpreter(self.nodes).run(*args)


def _known_as(argument: fx.Node) -> str:
    """Return the input of the graph of which alone a value is made, or the value's own name."""
    inputs = [n for n in _reached([argument], forward=False) if n.op == "placeholder"]
    return str(inputs[0].target) if len(inputs) == 1 else argument.name


def _item(graph: fx.Graph, call: fx.Node, number: int) -> fx.Node:
    return graph.call_function(operator.getitem, (call, number))


def _extract(
    whole: fx.GraphModule,
    region: Sequence[fx.Node],
    arguments: Sequence[fx.Node],
    results: Sequence[fx.Node],
) -> fx.GraphModule:
    root, graph = nn.Module(), fx.Graph()
    copied = {n: graph.placeholder(n.name) for n in arguments}

    def load(node: fx.Node) -> fx.Node:
        if node not in copied:
            copied[node] = graph.node_copy(node)  # a constant
        return copied[node]

    for node in region:
        copied[node] = graph.node_copy(node, load)
        copied[node].meta = {k: v for k, v in node.meta.items() if k == "stack_trace"}
    made = [copied[n] for n in results]
    graph.output(made[0] if len(made) == 1 else tuple(made))
    constants = {s for n in region for s in n.all_input_nodes if s.op == "get_attr"}
    _keep(root, whole, [*region, *constants])
    return fx.GraphModule(root, graph, "Between")


def _keep(root: nn.Module, whole: nn.Module, nodes: Iterable[fx.Node]) -> None:
    """Put what nodes call and read where they look for it: modules, parameters and buffers."""
    for node in nodes:
        if node.op not in {"call_module", "get_attr"}:
            continue
        *path, last = str(node.target).split(".")
        source, holder = whole, root
        for name in path:
            source = getattr(source, name)
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = getattr(holder, name)
        value: Any = getattr(source, last)
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            holder.register_buffer(last, value)
        else:
            setattr(holder, last, value)

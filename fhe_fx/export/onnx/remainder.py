"""What of a model stays with the client: before the circuit and after it, as two graphs.

`before` takes the model's inputs and returns the integers to encrypt, and whatever else is needed
later. `after` takes the decrypted integers, those other values, and returns the model's results.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fhe_fx.errors import BackendError
from fhe_fx.export.onnx.model import encoded_name, result_name
from fhe_fx.ir.ops import (
    ENTER,
    GATE,
    LEAVE,
    LINEAR,
    MASKED_SOFTMAX,
    PUT_PAIRS,
    SCALE,
    SHIFT,
    TABULATED,
    TAKE_PAIRS,
)
from fhe_fx.ir.program import Program
from fhe_fx.passes import Annotate, Partition, Pipeline
from fhe_fx.passes.partition import ENCRYPTED, extract
from fhe_fx.runtime.codec import Codec, Port
from fhe_fx.runtime.region import Region

__all__ = ["Half", "remainder"]


@dataclass(frozen=True)
class Half:
    """One of the two graphs, with a name for each input and result."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    examples: tuple[Tensor, ...]
    """Zeros of the shape and type of each input."""


def remainder(whole: Program, region: Region) -> tuple[Half, Half]:
    """Cut a region out of a model and return the two halves of the rest.

    A value that both halves speak of has the same name in both, and the integers are called as the
    inputs and results of the integer model.

    Args:
        whole: the captured model with the region's arguments marked; left as it is.
        region: lowered from the submodule of the same path.

    Raises:
        BackendError: if the model computes in another type than float32.
    """
    _check_float32(whole)
    module = _around(whole, region)
    nodes = [n for n in module.graph.nodes if n.op in {"call_function", "call_module"}]
    circuit = next(n for n in nodes if n.target == ENCRYPTED)
    first, second = nodes[: nodes.index(circuit)], nodes[nodes.index(circuit) + 1 :]
    places = [n for n in module.graph.nodes if n.op == "placeholder"]
    names = {n: _own_name(n.name) for n in places}
    for node in _read_after([*places, *first], circuit):
        names.setdefault(node, f"carried_{len(names) - len(places)}")
    codec = Codec.of(region.program)
    return _before(module, first, circuit, names, codec), _after(
        module, second, circuit, names, codec
    )


def _check_float32(whole: Program) -> None:
    types = {
        t.dtype
        for t in (*whole.module.parameters(), *whole.module.buffers())
        if t.is_floating_point()
    }
    if other := sorted(str(t) for t in types - {torch.float32}):
        raise BackendError(
            f"{whole.name} computes in {', '.join(other)}; its ONNX models are float32. "
            f"Call model.float() before it is encrypted."
        )


# One graph around the circuit ---------------------------------------------------------------------


def _around(whole: Program, region: Region) -> fx.GraphModule:
    """Return the whole model as one flat graph in which the circuit alone is a submodule."""
    outer = Program(copy.deepcopy(whole.module), name=region.name)
    Pipeline((Annotate(region.name), Partition())).run(outer)
    root, graph = nn.Module(), fx.Graph()
    places = {}
    for node in outer.placeholders:
        places[node] = graph.placeholder(node.name)
        places[node].meta = dict(node.meta)

    def around_region(*values: fx.Node) -> Any:
        return _inline(root, graph, region.composed, values, {})

    results = _inline(root, graph, outer.module, list(places.values()), {ENCRYPTED: around_region})
    graph.output(tuple(_computed(graph, r) for r in results))
    return fx.GraphModule(root, graph)


def _computed(graph: fx.Graph, result: fx.Node) -> fx.Node:
    """Let a result that is a constant be computed: a half returns no attributes."""
    if result.op != "get_attr":
        return result
    made = graph.call_function(torch.clone, (result,))
    made.meta = dict(result.meta)
    return made


def _inline(
    root: nn.Module,
    graph: fx.Graph,
    module: fx.GraphModule,
    inputs: Sequence[Any],
    calls: dict[str, Callable[..., Any]],
) -> Any:
    """Write a module's nodes into a graph; submodules in `calls` as they say, ENCRYPTED kept."""
    env: dict[fx.Node, Any] = dict(
        zip((n for n in module.graph.nodes if n.op == "placeholder"), inputs, strict=True)
    )
    for node in module.graph.nodes:
        args = fx.node.map_arg(node.args, env.__getitem__)
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return args[0]
        name = str(node.target)
        if node.op == "get_attr":
            own = f"c{sum(1 for _ in root.buffers())}"
            root.register_buffer(own, operator.attrgetter(name)(module).detach())
            env[node] = graph.get_attr(own)
        elif node.op == "call_module" and name in calls:
            env[node] = calls[name](*args)
        elif node.op == "call_module" and name == ENCRYPTED:
            env[node] = graph.call_module(ENCRYPTED, args)
            root.add_module(ENCRYPTED, nn.Identity())  # stands for the circuit; never run
        elif node.op == "call_module":
            env[node] = _inline(
                root, graph, cast(fx.GraphModule, module.get_submodule(name)), args, {}
            )
        elif _is_item_of_known(node, args):
            env[node] = args[0][args[1]]
            continue
        else:
            kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
            env[node] = graph.call_function(_PLAIN.get(node.target, node.target), args, kwargs)
        if isinstance(env[node], fx.Node):
            env[node].meta = dict(node.meta)
    raise AssertionError("a graph without output")


def _is_item_of_known(node: fx.Node, args: Sequence[Any]) -> bool:
    """Say whether a node takes an item of results that are written out already."""
    return getattr(node.target, "__name__", "") == "_item" and isinstance(args[0], tuple)


# The halves -----------------------------------------------------------------------------------


def _read_after(nodes: Sequence[fx.Node], circuit: fx.Node) -> list[fx.Node]:
    """List the values, made before the circuit, that are read after it."""
    known = {*nodes, circuit}
    return [n for n in nodes if any(u not in known for u in n.users)]


def _own_name(name: str) -> str:
    """Return the name of a model's input, changed if it could be a name that is given here."""
    return f"{name}_" if re.fullmatch(r"(encoded|result|carried|output)_\d+", name) else name


def _before(
    module: fx.GraphModule,
    nodes: Sequence[fx.Node],
    circuit: fx.Node,
    names: Mapping[fx.Node, str],
    codec: Codec,
) -> Half:
    places = [n for n in names if n.op == "placeholder"]
    carried = [n for n in names if n.op != "placeholder"]
    entering = cast("list[fx.Node]", list(circuit.args))
    part = extract(module, nodes, places, [*entering, *carried])
    end = next(iter(reversed(part.graph.nodes)))
    values = list(end.args[0])
    part.add_module("codec", _Encode(codec.inputs))
    with part.graph.inserting_before(end):
        encoded = part.graph.call_module("codec", tuple(values[: len(entering)]))
        items = [
            part.graph.call_function(operator.getitem, (encoded, k))
            for k in range(len(codec.inputs))
        ]
    end.args = ((*items, *values[len(entering) :]),)
    part.recompile()
    return Half(
        part,
        tuple(names[n] for n in places),
        (*map(encoded_name, range(len(codec.inputs))), *(names[n] for n in carried)),
        tuple(_zeros(n) for n in places),
    )


def _after(
    module: fx.GraphModule,
    nodes: Sequence[fx.Node],
    circuit: fx.Node,
    names: Mapping[fx.Node, str],
    codec: Codec,
) -> Half:
    known = {*nodes}
    read = [n for n in names if any(u in known or u.op == "output" for u in n.users)]
    results = list(next(iter(reversed(module.graph.nodes))).args[0])
    part = extract(module, nodes, [circuit, *read], results)
    part.add_module("codec", _Decode(codec.results))
    place = next(iter(part.graph.nodes))
    with part.graph.inserting_before(place):
        given = [part.graph.placeholder(result_name(k)) for k in range(len(codec.results))]
    for node in given:
        node.target = node.name  # unique, also where an argument of the model has the name
    first = next(n for n in part.graph.nodes if n.op != "placeholder")
    with part.graph.inserting_before(first):
        decoded = part.graph.call_module("codec", tuple(given))
    place.replace_all_uses_with(decoded)
    part.graph.erase_node(place)
    part.recompile()
    integers = (torch.zeros(port.shape, dtype=torch.int64) for port in codec.results)
    return Half(
        part,
        (*map(result_name, range(len(codec.results))), *(names[n] for n in read)),
        tuple(f"output_{k}" for k in range(len(results))),
        (*integers, *(_zeros(n) for n in read)),
    )


def _zeros(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    return torch.zeros(tuple(value.shape), dtype=value.dtype)


class _Coding(nn.Module):
    """Scales and offsets of ports, as buffers."""

    def __init__(self, ports: Sequence[Port]) -> None:
        super().__init__()
        self.ports = tuple(ports)
        for number, port in enumerate(ports):
            self.register_buffer(f"scale_{number}", port.type.scale.double())
            self.register_buffer(f"offset_{number}", port.type.offset.double())

    def numbers(self, k: int) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"scale_{k}"), self.get_buffer(f"offset_{k}")


class _Encode(_Coding):
    """`Codec.encode` as a module."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        encoded = []
        for number, port in enumerate(self.ports):
            scale, offset = self.numbers(number)
            whole = ((inputs[port.source].double() - offset) / scale).round()
            encoded.append(whole.clamp(port.type.low, port.type.high).long())
        return tuple(encoded)


class _Decode(_Coding):
    """`Codec.decode` as a module."""

    def forward(self, *results: Tensor) -> tuple[Tensor, ...]:
        decoded = []
        for number, q in enumerate(results):
            scale, offset = self.numbers(number)
            decoded.append((q.double() * scale + offset).float())
        return tuple(decoded)


# Operators of the float dialect, in PyTorch's own ---------------------------------------------


def _identity(x: Tensor, *_: object) -> Tensor:
    return x


def _take_pairs(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return x[..., rows, columns]


def _put_pairs(x: Tensor, rows: Tensor, columns: Tensor, n_rows: int, n_columns: int) -> Tensor:
    flat = x.new_zeros((*x.shape[:-1], n_rows * n_columns))
    where = (rows * n_columns + columns).expand(x.shape)
    return flat.scatter(-1, where, x).reshape(*x.shape[:-1], n_rows, n_columns)


def _masked_softmax(x: Tensor, live: Tensor, is_log: bool) -> Tensor:
    live = live.expand(x.shape)
    hidden = torch.where(live, x, torch.finfo(x.dtype).min)
    result = torch.log_softmax(hidden, -1) if is_log else torch.softmax(hidden, -1)
    return torch.where(live, result, 0.0)


_PLAIN: dict[Any, Callable[..., Any]] = {
    ENTER: _identity,
    LEAVE: _identity,
    TABULATED: _identity,
    SCALE: torch.mul,
    GATE: torch.mul,
    SHIFT: torch.add,
    LINEAR: torch.matmul,
    TAKE_PAIRS: _take_pairs,
    PUT_PAIRS: _put_pairs,
    MASKED_SOFTMAX: _masked_softmax,
}

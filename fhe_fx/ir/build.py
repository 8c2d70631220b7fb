"""Writes nodes of the dialect, with shape and provenance, into the graph of a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import (
    GATE,
    LINEAR,
    LOOKUP,
    MASKED_SOFTMAX,
    PUT_PAIRS,
    ROUND,
    SCALE,
    SHIFT,
    TAKE_PAIRS,
)

__all__ = ["PROVENANCE", "Builder", "compact", "composed", "elementwise", "hold", "inline"]

PROVENANCE = ("module_path", "source", "made_by")
"""Keys of `node.meta` that say where a node comes from."""


def elementwise(*steps: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> fx.GraphModule:
    """Build a function of one tensor from a chain of calls.

    Args:
        steps: `(operator, arguments after the first, keyword arguments)`, applied in order.
            Tensors among the arguments become buffers.
    """
    root = torch.nn.Module()
    graph = fx.Graph()
    value = graph.placeholder("x")
    for target, args, kwargs in steps:
        rest = []
        for arg in args:
            if isinstance(arg, Tensor):
                name = f"c{sum(1 for _ in root.buffers())}"
                root.register_buffer(name, arg)
                rest.append(graph.get_attr(name))
            else:
                rest.append(arg)
        value = graph.call_function(target, (value, *rest), kwargs)
    graph.output(value)
    return fx.GraphModule(root, graph)


def hold(holder: torch.nn.Module, graph: fx.Graph, value: Tensor) -> fx.Node:
    """Emit a reference to a tensor, kept in the module of a function as a buffer."""
    name = f"c{sum(1 for _ in holder.buffers())}"
    holder.register_buffer(name, value.clone())
    return graph.get_attr(name)


def inline(
    holder: torch.nn.Module, graph: fx.Graph, function: fx.GraphModule, x: fx.Node
) -> fx.Node:
    """Copy the graph of `function`, applied to x, into another's, and return its result."""
    copied: dict[fx.Node, fx.Node] = {}
    for node in function.graph.nodes:
        if node.op == "placeholder":
            copied[node] = x
        elif node.op == "get_attr":
            copied[node] = hold(holder, graph, getattr(function, node.target))
        elif node.op == "output":
            return copied[node.args[0]]
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    raise AssertionError("a graph without output")


def composed(*functions: fx.GraphModule) -> fx.GraphModule:
    """Return the function that applies all of some functions of one tensor, the first one first."""
    holder, graph = torch.nn.Module(), fx.Graph()
    value = graph.placeholder("x")
    for function in functions:
        value = inline(holder, graph, function, value)
    graph.output(value)
    return fx.GraphModule(holder, graph)


def compact(values: Tensor) -> Tensor:
    """Return values as float32, with size one where they do not vary along a dimension."""
    values = values.float()
    for dim in range(values.dim()):
        first = values.narrow(dim, 0, 1)
        if torch.equal(first.expand(values.shape), values):
            values = first
    return values


class Builder:
    """Emits nodes before a given one; each carries the provenance of `origin`."""

    def __init__(
        self,
        module: fx.GraphModule,
        before: fx.Node,
        origin: fx.Node | None = None,
        made_by: str = "",
    ) -> None:
        self.module = module
        self.graph = module.graph
        self.before = before
        self.provenance = {
            key: (origin or before).meta[key]
            for key in PROVENANCE
            if key in (origin or before).meta
        }
        if made_by:
            self.provenance["made_by"] = made_by

    # Emission -------------------------------------------------------------------------------

    def _finish(self, node: fx.Node, val: Tensor) -> fx.Node:
        node.meta.update(self.provenance)
        # Row-major on the meta device: the dialect knows shapes, not memory layouts.
        node.meta["val"] = torch.empty(val.shape, dtype=val.dtype, device="meta")
        return node

    def call(self, target: Any, *args: Any) -> fx.Node:
        """Emit a call of an operator; its shape is found on the meta device."""

        def load(n: fx.Node) -> Tensor:
            return cast(Tensor, n.meta["val"])

        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args)
        return self._finish(node, target(*fx.node.map_arg(args, load)))

    def constant(self, tensor: Tensor) -> fx.Node:
        """Emit a reference to a constant, kept in the module as a buffer."""
        number = len(self.module._buffers)
        while hasattr(self.module, f"c{number}"):
            number += 1
        name = f"c{number}"
        self.module.register_buffer(name, tensor.detach().clone())
        with self.graph.inserting_before(self.before):
            node = self.graph.get_attr(name)
        return self._finish(node, tensor.to("meta"))

    def _constant_for(self, x: fx.Node, value: Tensor | float) -> fx.Node:
        dtype = x.meta["val"].dtype
        tensor = torch.as_tensor(value, dtype=dtype)
        if torch.broadcast_shapes(tensor.shape, d.shape_of(x)) != torch.Size(d.shape_of(x)):
            raise ValueError(
                f"a constant of shape {tuple(tensor.shape)} does not broadcast to {d.shape_of(x)}"
            )
        return self.constant(tensor)

    # Structural -----------------------------------------------------------------------------

    def view(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Reshape, in row-major order. The identity emits nothing."""
        shape = list(torch.empty(d.shape_of(x), device="meta").reshape(list(shape)).shape)
        return x if tuple(shape) == d.shape_of(x) else self.call(d.VIEW, x, shape)

    def permute(self, x: fx.Node, dims: Sequence[int]) -> fx.Node:
        """Permute dimensions."""
        dims = [dim % len(dims) for dim in dims]
        return x if dims == list(range(len(dims))) else self.call(d.PERMUTE, x, dims)

    def transpose(self, x: fx.Node, first: int, second: int) -> fx.Node:
        """Swap two dimensions."""
        dims = list(range(len(d.shape_of(x))))
        dims[first], dims[second] = dims[second], dims[first]
        return self.permute(x, dims)

    def expand(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Broadcast to `shape`, adding leading dimensions where it has more."""
        shape = tuple(torch.empty(d.shape_of(x), device="meta").expand(list(shape)).shape)
        if len(shape) > len(d.shape_of(x)):
            x = self.view(x, (1,) * (len(shape) - len(d.shape_of(x))) + d.shape_of(x))
        return x if shape == d.shape_of(x) else self.call(d.EXPAND, x, list(shape))

    def index_select(self, x: fx.Node, dim: int, index: Tensor) -> fx.Node:
        """Take the entries `index` along `dim`."""
        size = d.shape_of(x)[dim]
        if index.shape == (size,) and torch.equal(index, torch.arange(size)):
            return x
        return self.call(d.INDEX_SELECT, x, dim % len(d.shape_of(x)), self.constant(index))

    def cat(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        """Concatenate."""
        if len(parts) == 1:
            return parts[0]
        return self.call(d.CAT, list(parts), dim % len(d.shape_of(parts[0])))

    def zeros(self, x: fx.Node, dim: int, n: int) -> fx.Node:
        """Make n encrypted zeros along `dim`, for `cat`; elsewhere the shape is that of x."""
        return self.scale(self.index_select(x, dim, torch.zeros(n, dtype=torch.int64)), 0.0)

    def take_pairs(self, x: fx.Node, rows: Tensor, columns: Tensor) -> fx.Node:
        """Gather pairs of the last two dimensions into one."""
        return self.call(TAKE_PAIRS, x, self.constant(rows), self.constant(columns))

    def put_pairs(
        self, x: fx.Node, rows: Tensor, columns: Tensor, n_rows: int, n_columns: int
    ) -> fx.Node:
        """Scatter the last dimension into a matrix of zeros."""
        return self.call(
            PUT_PAIRS, x, self.constant(rows), self.constant(columns), n_rows, n_columns
        )

    # Affine ---------------------------------------------------------------------------------

    def _broadcast(self, x: fx.Node, y: fx.Node) -> tuple[fx.Node, fx.Node]:
        shape = torch.broadcast_shapes(d.shape_of(x), d.shape_of(y))
        return self.expand(x, shape), self.expand(y, shape)

    def add(self, x: fx.Node, y: fx.Node) -> fx.Node:
        """Add two encrypted tensors, broadcast against each other."""
        return self.call(d.ADD, *self._broadcast(x, y))

    def sub(self, x: fx.Node, y: fx.Node) -> fx.Node:
        """Subtract two encrypted tensors, broadcast against each other."""
        return self.call(d.SUB, *self._broadcast(x, y))

    def scale(self, x: fx.Node, factor: Tensor | float) -> fx.Node:
        """Multiply by a constant that broadcasts to the shape of x."""
        return self.call(SCALE, x, self._constant_for(x, factor))

    def shift(self, x: fx.Node, offset: Tensor | float) -> fx.Node:
        """Add a constant that broadcasts to the shape of x."""
        return self.call(SHIFT, x, self._constant_for(x, offset))

    def gate(self, x: fx.Node, factor: fx.Node) -> fx.Node:
        """Multiply by clear integers of the same shape, which each run brings."""
        return self.call(GATE, x, factor)

    def computed(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Emit any operator on clear values, which the client computes before it encrypts.

        `node.meta["clear"]` says that rules may read it as clear, `node.meta["is_outside"]` that
        the encrypted region begins behind it.
        """

        def load(n: fx.Node) -> Tensor:
            return cast(Tensor, n.meta["val"])

        def held(value: Any) -> Any:
            return self.constant(value) if isinstance(value, Tensor) else value

        args, kwargs = fx.node.map_aggregate((args, kwargs), held)
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.provenance, clear=True, is_outside=True)
        node.meta["val"] = target(*fx.node.map_arg(args, load), **fx.node.map_arg(kwargs, load))
        return node

    def promoted(self, value: fx.Node) -> fx.Node:
        """Emit a clear value as one that the client encrypts."""
        node = self.computed(torch.ops.aten.to.dtype, value, torch.float32)
        del node.meta["clear"]
        return node

    def linear(self, x: fx.Node, weight: Tensor) -> fx.Node:
        """Multiply by a constant matrix on the right."""
        return self.call(LINEAR, x, self.constant(weight))

    def sum(self, x: fx.Node, dims: Sequence[int], keepdim: bool = False) -> fx.Node:
        """Sum over dimensions."""
        rank = len(d.shape_of(x))
        return self.call(d.SUM, x, sorted(dim % rank for dim in dims), keepdim)

    # Not affine -----------------------------------------------------------------------------

    def mul(self, x: fx.Node, y: fx.Node) -> fx.Node:
        """Multiply two encrypted tensors, broadcast against each other."""
        return self.call(d.MUL, *self._broadcast(x, y))

    def matmul(self, x: fx.Node, y: fx.Node) -> fx.Node:
        """Matrix product of two encrypted tensors."""
        return self.call(d.MATMUL, x, y)

    def masked_softmax(self, x: fx.Node, live: Tensor, is_log: bool = False) -> fx.Node:
        """Softmax over the last dimension, or its logarithm, among live entries."""
        return self.call(MASKED_SOFTMAX, x, self.constant(live), is_log)

    def map(self, x: fx.Node, function: fx.GraphModule, hint: str = "map") -> fx.Node:
        """Apply one function of one tensor, element by element."""
        number = 0
        while hasattr(self.module, f"{hint}_{number}"):
            number += 1
        self.module.add_submodule(f"{hint}_{number}", function)
        with self.graph.inserting_before(self.before):
            node = self.graph.call_module(f"{hint}_{number}", (x,))
        return self._finish(node, torch.empty_like(x.meta["val"]))

    def apply(self, x: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Apply one elementwise PyTorch operator to an encrypted tensor."""
        hint = str(getattr(target, "_opname", target)).strip("_")
        return self.map(x, elementwise((target, args, kwargs)), hint)

    def lookup(self, x: fx.Node, tables: Tensor, which: Tensor, bits: int, lsbs: int) -> fx.Node:
        """Emit a programmable bootstrap of each element."""
        return self.call(LOOKUP, x, self.constant(tables), self.constant(which), bits, lsbs)

    def round(self, x: fx.Node, bits: int, lsbs: int) -> fx.Node:
        """Round away low bits of a result."""
        return self.call(ROUND, x, bits, lsbs)

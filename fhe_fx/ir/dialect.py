"""Which operators make the dialect, and typed access to the fx nodes that hold them."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor, fx

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

__all__ = [
    "ADD",
    "AFFINE",
    "CAT",
    "EMBED",
    "EXPAND",
    "INDEX_SELECT",
    "MATMUL",
    "MUL",
    "PERMUTE",
    "STRUCTURAL",
    "SUB",
    "SUM",
    "VIEW",
    "along_moves",
    "before_moves",
    "constant",
    "evaluate",
    "input_node",
    "is_call",
    "is_clear",
    "is_encrypted",
    "is_map",
    "map_of",
    "operands",
    "readers",
    "shape_of",
]

aten = torch.ops.aten
VIEW = aten.reshape.default
PERMUTE = aten.permute.default
EXPAND = aten.expand.default
INDEX_SELECT = aten.index_select.default
CAT = aten.cat.default
ADD = aten.add.Tensor
SUB = aten.sub.Tensor
SUM = aten.sum.dim_IntList
MUL = aten.mul.Tensor
MATMUL = aten.matmul.default
EMBED = aten.embedding.default
"""Rows of a constant table by clear integers. It is the client's: no ciphertext can be an index."""

STRUCTURAL = frozenset({VIEW, PERMUTE, EXPAND, INDEX_SELECT, CAT, TAKE_PAIRS, PUT_PAIRS})
"""Operators that move, repeat or drop elements and leave their values alone."""

AFFINE = STRUCTURAL | {ADD, SUB, SUM, SCALE, SHIFT, LINEAR}
"""Operators that cost no look-up."""

PRODUCTS = frozenset({MUL, MATMUL})
"""Operators on two encrypted tensors that are not linear."""

FLOAT_OPS = AFFINE | PRODUCTS | {MASKED_SOFTMAX, GATE, EMBED}
INTEGER_OPS = (AFFINE | {LOOKUP, ROUND, GATE}) - {TAKE_PAIRS, PUT_PAIRS}


def is_call(node: object, *targets: object) -> bool:
    """Say whether `node` calls one of the operators `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in set(targets)


def is_map(node: object) -> bool:
    """Say whether `node` applies one function of one tensor, element by element."""
    return isinstance(node, fx.Node) and node.op == "call_module"


def is_encrypted(node: fx.Node) -> bool:
    """Say whether the value of `node` depends on the region's inputs."""
    return node.op in {"placeholder", "call_function", "call_module"}


def is_clear(node: fx.Node) -> bool:
    """Say whether an input is clear: integers that the server reads, as factors and as no more."""
    return (
        node.op == "placeholder"
        and bool(node.users)
        and all(is_call(u, GATE) and u.args[0] is not node for u in node.users)
    )


def owner(node: fx.Node) -> fx.GraphModule:
    """Return the GraphModule that a node belongs to."""
    return cast(fx.GraphModule, node.graph.owning_module)


def constant(node: fx.Node) -> Tensor:
    """Return the tensor that a `get_attr` node names."""
    return cast(Tensor, operator.attrgetter(cast(str, node.target))(owner(node)))


def map_of(node: fx.Node) -> fx.GraphModule:
    """Return the elementwise function that a map node applies, as a graph of its own."""
    return cast(fx.GraphModule, owner(node).get_submodule(cast(str, node.target)))


def input_node(node: fx.Node, index: int = 0) -> fx.Node:
    """Return argument number `index` of `node`, which is a node."""
    return cast(fx.Node, node.args[index])


def operands(node: fx.Node) -> list[fx.Node]:
    """Return the encrypted inputs of `node`, in order."""
    return [n for n in node.all_input_nodes if n.op != "get_attr"]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of the value of `node`."""
    return tuple(node.meta["val"].shape)


def before_moves(node: fx.Node) -> fx.Node:
    """Return the node whose elements `node` only moves, repeats or drops."""
    while is_call(node, *STRUCTURAL) and not is_call(node, CAT):
        node = input_node(node)
    return node


def readers(node: fx.Node) -> set[fx.Node]:
    """Return what reads the elements of `node`, moved or not."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= readers(user) if is_call(user, *STRUCTURAL - {CAT}) else {user}
    return found


def along_moves(node: fx.Node, source: fx.Node, value: Tensor) -> Tensor:
    """Move `value`, of the shape of `source`, as the path from there to `node` does."""
    moves = []
    while node is not source:
        moves.append(node)
        node = input_node(node)
    for move in reversed(moves):
        value = evaluate(move, value)
    return value


def evaluate(node: fx.Node, *values: Tensor) -> Tensor:
    """Apply the operator of `node` to `values`, which stand for its encrypted operands in order.

    Constants are read from the module. Any tensor of the right shape will do: scales, offsets,
    element numbers and masks travel through structural operators this way.
    """
    given = dict(zip(operands(node), values, strict=True))

    def load(n: fx.Node) -> Tensor:
        return given[n] if n in given else constant(n)

    args = fx.node.map_arg(node.args, load)
    kwargs = fx.node.map_arg(node.kwargs, load)
    if node.op == "call_module":
        return cast(Tensor, map_of(node)(*args))
    return cast(Tensor, cast("torch._ops.OpOverload", node.target)(*args, **kwargs))

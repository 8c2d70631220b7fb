"""Rules that a graph of each stage obeys, checked after every pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import fx

from fhe_fx.errors import InvariantError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import GATE, LOOKUP, ROUND, SCALE, SHIFT
from fhe_fx.ir.printer import format_program, operator_name
from fhe_fx.ir.types import ValueType
from fhe_fx.ir.views import Lookup, Round

if TYPE_CHECKING:
    from fhe_fx.ir.program import Program

__all__ = ["FLOAT_RULES", "INTEGER_RULES", "verify"]

Rule = Callable[[fx.Node], "str | None"]
"""Returns what is wrong with a node, or None."""


def _known_operator(allowed: frozenset[object], maps: bool) -> Rule:
    def rule(node: fx.Node) -> str | None:
        if node.op in {"placeholder", "output", "get_attr"} or (maps and d.is_map(node)):
            return None
        if node.op == "call_function" and node.target in allowed:
            return None
        return f"{operator_name(node)} is not an operator of this stage"

    return rule


def _has_value(node: fx.Node) -> str | None:
    if node.op == "output" or "val" in node.meta:
        return None
    return "the node has no shape (node.meta['val'])"


def _shape_is_true(node: fx.Node) -> str | None:
    if not d.is_encrypted(node) or node.op == "placeholder":
        return None
    if d.is_map(node):
        expected = d.shape_of(d.input_node(node))
    else:
        args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        expected = tuple(node.target(*args).shape)  # type: ignore[operator]
    if expected != d.shape_of(node):
        return f"it says shape {d.shape_of(node)}, its operator gives {expected}"
    return None


def _addends_agree(node: fx.Node) -> str | None:
    if not d.is_call(node, d.ADD, d.SUB, d.MUL):
        return None
    shapes = [d.shape_of(n) for n in _both_operands(node)]
    if len(shapes) != 2 or shapes[0] != shapes[1]:
        return f"operands have shapes {shapes}; both must be encrypted and equal in shape"
    return None


def _factor_is_clear(node: fx.Node) -> str | None:
    if not d.is_call(node, GATE):
        return None
    x, factor = d.input_node(node), d.input_node(node, 1)
    if d.shape_of(x) != d.shape_of(factor):
        return f"its factor has shape {d.shape_of(factor)}, what it multiplies {d.shape_of(x)}"
    if not (d.is_clear(factor) or factor.meta.get("is_outside")):
        return f"its factor, {factor.name}, is not a clear input, or is read by others than gates"
    return None


def _both_operands(node: fx.Node) -> list[fx.Node]:
    """Return both operands of a binary node, twice the same if it is one tensor."""
    return [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]


def _constants_broadcast(node: fx.Node) -> str | None:
    if not d.is_call(node, SCALE, SHIFT):
        return None
    shape = d.shape_of(d.input_node(node))
    other = tuple(d.constant(d.input_node(node, 1)).shape)
    if torch.broadcast_shapes(shape, other) != torch.Size(shape):
        return f"a constant of shape {other} does not broadcast to {shape}"
    return None


def _has_type(node: fx.Node) -> str | None:
    if not d.is_encrypted(node) or isinstance(node.meta.get("type"), ValueType):
        return None
    return "the node has no value type (node.meta['type'])"


def _tables_fit(node: fx.Node) -> str | None:
    if not d.is_call(node, LOOKUP):
        return None
    view = Lookup.of(node)
    entries, bits, lsbs = view.tables.shape[-1], view.bits, view.lsbs
    if entries != 1 << bits:
        return f"its tables have {entries} entries, a look-up of {bits} bits reads {1 << bits}"
    source = view.x.meta.get("type")
    if isinstance(source, ValueType) and source.bits != bits + lsbs:
        return f"it rounds {lsbs} of {source.bits} bits and reads {bits}"
    return None


def _rounds_a_result(node: fx.Node) -> str | None:
    if not d.is_call(node, ROUND):
        return None
    view = Round.of(node)
    if any(u.op != "output" for u in node.users):
        return "what it rounds is read by others than the client"
    source = view.x.meta.get("type")
    if isinstance(source, ValueType) and source.bits != view.bits + view.lsbs:
        return f"it rounds {view.lsbs} of {source.bits} bits and leaves {view.bits}"
    return None


def _integer_constants(node: fx.Node) -> str | None:
    if node.op == "get_attr" and d.constant(node).dtype.is_floating_point:
        return "a constant of the integer stage is not an integer"
    return None


FLOAT_RULES: tuple[Rule, ...] = (
    _known_operator(frozenset(d.FLOAT_OPS), maps=True),
    _has_value,
    _shape_is_true,
    _addends_agree,
    _factor_is_clear,
    _constants_broadcast,
)
INTEGER_RULES: tuple[Rule, ...] = (
    _known_operator(frozenset(d.INTEGER_OPS), maps=False),
    _has_value,
    _shape_is_true,
    _addends_agree,
    _factor_is_clear,
    _constants_broadcast,
    _has_type,
    _integer_constants,
    _tables_fit,
    _rounds_a_result,
)


def _fault(node: fx.Node, rules: tuple[Rule, ...]) -> str | None:
    """Return the first fault of a node; an operator that its arguments do not fit is one, too."""
    if node.meta.get("is_outside"):  # the client's: any operator may occur
        return None
    for rule in rules:
        try:
            fault = rule(node)
        except Exception as error:  # whatever operators raise on the meta device
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"{operator_name(node)} does not take its arguments: {reason}"
        if fault is not None:
            return fault
    return None


def verify(program: Program) -> None:
    """Check every rule of the program's stage on every node.

    Raises:
        InvariantError: lists all faults, with the printed lines around each.
    """
    if "integer" in program.properties:
        rules = INTEGER_RULES
    elif "normal" in program.properties:
        rules = FLOAT_RULES
    else:  # as captured: any ATen operator may occur
        return
    faults: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if (fault := _fault(node, rules)) is not None:
            faults[node] = fault
    if faults:
        listed = "\n".join(f"  {node.name}: {fault}" for node, fault in faults.items())
        raise InvariantError(
            f"{program.name}: {len(faults)} node(s) break the rules of the dialect.\n{listed}\n"
            f"{format_program(program, set(faults))}"
        )

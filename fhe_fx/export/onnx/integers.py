"""An integer program as an ONNX graph of int64 tensors, equal to the reference bit for bit.

Affine and structural operators have their counterparts in ONNX. A look-up becomes a `Gather`: the
table with its negative behind it is one period of what a blind rotation reads, so that a remainder
finds the entry, also of a value that has wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from fhe_fx.errors import BackendError
from fhe_fx.export.onnx.model import checked, encoded_name, finished, result_name
from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import PROVENANCE
from fhe_fx.ir.ops import GATE, LINEAR, LOOKUP, ROUND, SCALE, SHIFT
from fhe_fx.ir.printer import operator_name
from fhe_fx.ir.program import Program
from fhe_fx.ir.views import Cat, IndexSelect, Lookup, Permute, Round, Sum
from fhe_fx.runtime.codec import Codec

__all__ = ["integer_model"]

_NARROW = (np.int8, np.int16, np.int32)


def integer_model(program: Program) -> onnx.ModelProto:
    """Return the ONNX model of an integer program.

    Its inputs `encoded_0`, ... and results `result_0`, ... are int64;
    `metadata_props["fhe_fx.encodings"]` lists them with scale, offset and bounds. Each node names
    its module and source line in its own metadata.

    Args:
        program: lowered to integers.

    Raises:
        BackendError: if it is not lowered to integers, or the model is not valid ONNX.
    """
    if "integer" not in program.properties:
        raise BackendError(f"{program.name} is not lowered to integers; run the pipeline first.")
    emitter = _Emitter({n: encoded_name(k) for k, n in enumerate(program.placeholders)})
    for node in program.graph.nodes:
        emitter.emit(node)
    inputs = [_port(emitter.name(n), d.shape_of(n)) for n in program.placeholders]
    outputs = [_port(result_name(k), d.shape_of(n)) for k, n in enumerate(program.results)]
    graph = helper.make_graph(
        emitter.nodes, "integers", inputs, outputs, initializer=emitter.constants
    )
    return checked(finished(graph, program.name, Codec.of(program)))


def _port(name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, list(shape))


class _Emitter:
    """Writes one or more ONNX nodes for each node of a program."""

    def __init__(self, inputs: Mapping[fx.Node, str]) -> None:
        self._inputs = inputs
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._node: fx.Node | None = None
        self._count = 0

    def name(self, node: fx.Node) -> str:
        """Return what the value of a node is called."""
        return self._inputs.get(node, node.name)

    def emit(self, node: fx.Node) -> None:
        """Write a node; its value is called as the node is."""
        self._node, self._count = node, 0
        if node.op == "output":
            for number, result in enumerate(node.args[0]):  # type: ignore[arg-type]
                self._call("Identity", self.name(result), value=result_name(number))
        elif node.op == "call_function":
            rule = _RULES.get(node.target)
            if rule is None:
                raise BackendError(f"ONNX export knows no {operator_name(node)} ({node.name}).")
            rule(self, node)

    def _call(self, operator: str, *inputs: str, value: str = "", **attributes: Any) -> str:
        """Write one ONNX node and return the name of its value; the last of a rule names it."""
        assert self._node is not None
        if not value:
            value = f"{self._node.name}.{self._count}"
            self._count += 1
        made = helper.make_node(operator, inputs, [value], name=value, **attributes)
        for key in PROVENANCE:
            if key in self._node.meta:
                made.metadata_props.add(key=key, value=str(self._node.meta[key]))
        self.nodes.append(made)
        return value

    def _constant(self, values: Tensor | Sequence[int] | int) -> str:
        """Store integers as int64."""
        return self._store(torch.as_tensor(values, dtype=torch.int64).numpy())

    def _weight(self, values: Tensor) -> str:
        """Store integers in the narrowest type that holds them, widened when they are read."""
        array = values.numpy()
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        for narrow in _NARROW:
            if np.iinfo(narrow).min <= low and high <= np.iinfo(narrow).max:
                return self._call("Cast", self._store(array.astype(narrow)), to=TensorProto.INT64)
        return self._store(array)

    def _store(self, array: npt.NDArray[Any]) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name


def _binary(operator: str) -> Callable[[_Emitter, fx.Node], None]:
    def rule(e: _Emitter, n: fx.Node) -> None:
        e._call(operator, e.name(d.input_node(n)), e.name(d.input_node(n, 1)), value=n.name)

    return rule


def _with_constant(operator: str) -> Callable[[_Emitter, fx.Node], None]:
    def rule(e: _Emitter, n: fx.Node) -> None:
        weight = e._weight(d.constant(d.input_node(n, 1)))
        e._call(operator, e.name(d.input_node(n)), weight, value=n.name)

    return rule


def _view(e: _Emitter, n: fx.Node) -> None:
    shape = e._constant(list(d.shape_of(n)))
    e._call("Reshape", e.name(d.input_node(n)), shape, value=n.name, allowzero=1)


def _expand(e: _Emitter, n: fx.Node) -> None:
    e._call("Expand", e.name(d.input_node(n)), e._constant(list(d.shape_of(n))), value=n.name)


def _permute(e: _Emitter, n: fx.Node) -> None:
    view = Permute.of(n)
    rank = len(d.shape_of(n))
    e._call("Transpose", e.name(view.x), value=n.name, perm=[dim % rank for dim in view.dims])


def _index_select(e: _Emitter, n: fx.Node) -> None:
    view = IndexSelect.of(n)
    e._call("Gather", e.name(view.x), e._constant(view.index), value=n.name, axis=view.dim)


def _cat(e: _Emitter, n: fx.Node) -> None:
    view = Cat.of(n)
    e._call("Concat", *[e.name(part) for part in view.parts], value=n.name, axis=view.dim)


def _sum(e: _Emitter, n: fx.Node) -> None:
    view = Sum.of(n)
    e._call(
        "ReduceSum",
        e.name(view.x),
        e._constant(view.dims),
        value=n.name,
        keepdims=int(view.keepdim),
    )


def _lookup(e: _Emitter, n: fx.Node) -> None:
    """Read tables that go on anti-periodically.

    With s = 2**lsbs and tables of N entries, the entry of x is floor((x + s/2) / s) + N/2 modulo
    2N, of the table followed by its negative. ONNX divides towards zero, so the remainder of
    x + s/2 + s N/2 by 2 N s is taken first: it is not negative, and floor(y / s) mod 2N equals
    floor((y mod 2 N s) / s).
    """
    view = Lookup.of(n)
    size, slot = view.tables.shape[-1], 1 << view.lsbs
    start = slot // 2 if view.lsbs else 0
    moved = e._call("Add", e.name(view.x), e._constant(start + slot * (size // 2)))
    entry = e._call("Mod", moved, e._constant(2 * size * slot))
    if view.lsbs:
        entry = e._call("Div", entry, e._constant(slot))
    if view.tables.shape[0] > 1:
        entry = e._call("Add", entry, e._weight(view.which * (2 * size)))
    period = torch.cat([view.tables, -view.tables], -1).reshape(-1)
    e._call("Gather", e._weight(period), entry, value=n.name, axis=0)


def _round(e: _Emitter, n: fx.Node) -> None:
    """Round as a look-up does, and wrap into [-2**bits, 2**bits), with remainders alike."""
    view = Round.of(n)
    slot, half = 1 << view.lsbs, 1 << view.bits
    start = slot // 2 if view.lsbs else 0
    moved = e._call("Add", e.name(view.x), e._constant(start + slot * half))
    whole = e._call("Mod", moved, e._constant(2 * half * slot))
    if view.lsbs:
        whole = e._call("Div", whole, e._constant(slot))
    e._call("Sub", whole, e._constant(half), value=n.name)


_RULES: dict[object, Callable[[_Emitter, fx.Node], None]] = {
    d.ADD: _binary("Add"),
    d.SUB: _binary("Sub"),
    SCALE: _with_constant("Mul"),
    GATE: _binary("Mul"),
    SHIFT: _with_constant("Add"),
    LINEAR: _with_constant("MatMul"),
    d.SUM: _sum,
    d.VIEW: _view,
    d.EXPAND: _expand,
    d.PERMUTE: _permute,
    d.INDEX_SELECT: _index_select,
    d.CAT: _cat,
    LOOKUP: _lookup,
    ROUND: _round,
}
"""The rule of each operator of the integer stage."""

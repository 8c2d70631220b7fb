"""Reads an ONNX model of the float operators that exporters write as an fx graph.

Every node keeps its ONNX name, and the submodule that the exporter noted in it. What does not
depend on the values of inputs (shapes, masks, positions) is computed while reading. A package that
converts ONNX, onnx2torch 1.5, needs torchvision and knows operators of opset 17 and later one by
one; the table in `operators.py` is what transformers and convolutions need.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fhe_fx.errors import CaptureError, FheFxError, UnsupportedOpError
from fhe_fx.export.models import ModelError
from fhe_fx.export.onnx.operators import DTYPES, NUMBERED, OPERATORS

__all__ = ["read_onnx"]


@dataclass(frozen=True)
class _Value:
    """A value of the graph: what it is on an input of zeros, and the node that computes it."""

    shown: Any
    node: fx.Node | None
    """None if it does not depend on what the inputs hold."""


def read_onnx(path: Path) -> fx.GraphModule:
    """Read a model of static shapes.

    Args:
        path: an `.onnx` file.

    Returns:
        A graph that takes the model's inputs in order and returns its outputs.

    Raises:
        ModelError: if there is no such file, it is not ONNX, or `onnx` is not installed.
        CaptureError: if an input has a dynamic shape, or a node cannot be computed.
        UnsupportedOpError: lists all operators that have no translation.
    """
    graph = _load(path).graph
    _check_operators(path, graph.node)
    reader = _Reader(path)
    constants = {c.name: c for c in graph.initializer}
    for name, constant in constants.items():
        reader.values[name] = _Value(_tensor(constant), None)
    for given in graph.input:
        if given.name not in constants:
            reader.read_input(given)
    for node in graph.node:
        reader.read_node(node)
    return reader.finish([output.name for output in graph.output])


def _load(path: Path) -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModelError(f"{path} needs onnx: pip install 'fhe_fx[onnx]'") from error
    if not path.is_file():
        raise ModelError(f"There is no file {path}.")
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf gives many kinds
        raise ModelError(f"{path} cannot be read as an ONNX model: {error}.") from error


def _check_operators(path: Path, nodes: Sequence[Any]) -> None:
    missing: dict[str, list[str]] = {}
    for node in nodes:
        is_known = node.domain in {"", "ai.onnx"} and node.op_type in {
            *OPERATORS, "Constant", "Shape",
        }  # fmt: skip
        if not is_known:
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            missing.setdefault(kind, []).append(node.name or node.output[0])
    if missing:
        listed = "\n".join(
            f"  {kind}  {len(names)} time(s), first in {names[0]}"
            for kind, names in sorted(missing.items())
        )
        raise UnsupportedOpError(
            f"{path.name}: {len(missing)} operator(s) of ONNX have no translation.\n{listed}\n"
            f"Export the float model at opset 17 or later, without control flow or quantization."
        )


def _tensor(proto: Any) -> Tensor:
    from onnx import numpy_helper

    value = torch.from_numpy(numpy_helper.to_array(proto).copy())
    return value.float() if value.dtype == torch.float16 else value


class _Reader:
    """Builds the graph node by node."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[str, _Value] = {}
        self.constants: dict[str, fx.Node] = {}

    def read_input(self, given: Any) -> None:
        """Make a placeholder.

        Raises:
            CaptureError: if its shape is dynamic.
        """
        kind = given.type.tensor_type
        sizes: list[Any] = [d.dim_value or d.dim_param or "?" for d in kind.shape.dim]
        if not all(isinstance(n, int) for n in sizes):
            raise CaptureError(
                f"{self.path.name}: the input {given.name} has the dynamic shape "
                f"[{', '.join(map(str, sizes))}]; a circuit has one shape. Export without dynamic "
                f"axes."
            )
        shown = torch.zeros(sizes, dtype=DTYPES.get(kind.elem_type, torch.float32))
        node = self.graph.placeholder(_name(given.name))
        node.meta["val"] = shown
        self.values[given.name] = _Value(shown, node)

    def read_node(self, node: Any) -> None:
        """Compute a node, or write it into the graph if it depends on inputs.

        Raises:
            CaptureError: if it cannot be computed.
        """
        from onnx import helper

        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
        given = [self.values[name] if name else _Value(None, None) for name in node.input]
        if node.op_type == "Constant":
            self.values[node.output[0]] = _Value(_constant(attributes), None)
            return
        if node.op_type == "Shape":
            sizes = list(given[0].shown.shape)
            cut = sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))]
            self.values[node.output[0]] = _Value(torch.tensor(cut, dtype=torch.int64), None)
            return
        if node.op_type == "ConstantOfShape" and "value" in attributes:
            attributes["value"] = _tensor(attributes["value"])
        if node.op_type == "Split":
            attributes["outputs"] = len(node.output)
        rule = OPERATORS[node.op_type]
        try:
            shown = rule(*[v.shown for v in given], **attributes)
        except FheFxError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{self.path.name}: {node.op_type} {node.name or node.output[0]} cannot be "
                f"computed: {str(error).splitlines()[0] if str(error) else type(error).__name__}."
            ) from error
        self._keep(node, rule, given, attributes, shown)

    def _keep(
        self, node: Any, rule: Any, given: Sequence[_Value], attributes: dict[str, Any], shown: Any
    ) -> None:
        results = shown if isinstance(shown, tuple) else (shown,)
        if not any(v.node is not None for v in given):
            for name, value in zip(node.output, results, strict=False):
                self.values[name] = _Value(value, None)
            return
        made = self._call(node, rule, given, attributes)
        for number, (name, value) in enumerate(zip(node.output, results, strict=False)):
            one = made
            if isinstance(shown, tuple):
                one = self.graph.call_function(_item, (made, number))
                one.meta.update({k: v for k, v in made.meta.items() if k == "nn_module_stack"})
            self.values[name] = _Value(value, one)

    def _call(
        self, node: Any, rule: Any, given: Sequence[_Value], attributes: dict[str, Any]
    ) -> fx.Node:
        """Write a call whose constant integers stand in the code, and whose weights are buffers."""
        args = [
            v.node if v.node is not None else self._constant(node, number, v.shown)
            for number, v in enumerate(given)
        ]
        name = _name(node.name or node.output[0])
        made = self.graph.create_node(
            "call_function",
            _Bound(node.op_type, rule, attributes, args),
            tuple(a for a in args if isinstance(a, fx.Node)),
            name=name,
        )
        if stack := _stack(node):
            made.meta["nn_module_stack"] = stack
        return made

    def _constant(self, node: Any, number: int, value: Tensor | None) -> Any:
        """Return a weight's node, or what says how to compute as plain numbers.

        Tensors of numbers would be traced, and a shape that is traced is unknown.
        """
        if value is not None and number > 0 and node.op_type in NUMBERED:
            return value.numpy()
        return self._buffer(node.input[number], value)

    def _buffer(self, name: str, value: Tensor | None) -> fx.Node | Tensor | None:
        if value is None or not value.is_floating_point():
            return value
        if name not in self.constants:
            target = f"constant_{_name(name)}"
            self.root.register_buffer(target, value)
            self.constants[name] = self.graph.get_attr(target)
        return self.constants[name]

    def finish(self, outputs: Sequence[str]) -> fx.GraphModule:
        """Return the module."""
        found = [self.values[name] for name in outputs]
        nodes = [
            v.node if v.node is not None else self._buffer(n, v.shown.float())
            for n, v in zip(outputs, found, strict=True)
        ]
        self.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)


class _Bound:
    """A rule with its attributes and constant integers; called with what is left."""

    def __init__(
        self, op_type: str, rule: Any, attributes: dict[str, Any], args: list[Any]
    ) -> None:
        self.__name__ = self.__qualname__ = op_type
        self.__module__ = __name__
        self.rule, self.attributes = rule, attributes
        self.args = [None if isinstance(a, fx.Node) else a for a in args]
        self.is_open = [isinstance(a, fx.Node) for a in args]

    def __call__(self, *values: Tensor) -> Any:
        rest = iter(values)
        args = [
            next(rest) if is_open else a for is_open, a in zip(self.is_open, self.args, strict=True)
        ]
        return self.rule(*args, **self.attributes)


def _item(values: tuple[Tensor, ...], number: int) -> Tensor:
    return values[number]


def _constant(attributes: dict[str, Any]) -> Tensor:
    (key, value), *_ = attributes.items()
    if key == "value":
        return _tensor(value)
    return torch.tensor(value)


def _name(text: str) -> str:
    name = re.sub(r"\W+", "_", text).strip("_")
    return name if name[:1].isalpha() else f"n_{name}"


def _stack(node: Any) -> dict[str, tuple[str, str]]:
    """Return the submodules in which a node stood, as exporters of torch note them.

    One writes a list of paths into the node's metadata, the older one names the node after them.
    """
    noted = {p.key: p.value for p in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
    if noted is not None:
        import ast

        paths = [p for p in ast.literal_eval(noted)[:-1] if p]
    else:
        steps = node.name.strip("/").split("/")[:-1] if node.name.startswith("/") else []
        paths = [".".join(steps[: i + 1]) for i in range(len(steps))]
    return {path: (path, "") for path in paths}

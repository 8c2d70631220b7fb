"""ONNX files as models: what is read, where its parts are, and what is refused."""
# onnx and parts of torch are not typed:
# mypy: disable-error-code="no-untyped-call, attr-defined"

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx.errors import CaptureError, UnsupportedOpError
from fhe_fx.export.models import ModelError
from fhe_fx.options import Options
from tests.families.zoo import FAMILIES

onnx = pytest.importorskip("onnx")
FEW = Options(n_bits=6, n_samples=8)


class First(nn.Module):
    """Returns the first result of a model of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.config.use_cache = False

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.model(ids)[0]
        return y


def exported(model: nn.Module, example: Tensor, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), path, dynamo=True, verbose=False)
    return path


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "part"), [("LLaMA", "model.layers.0.self_attn"), ("small CNN", "block")]
)
@torch.no_grad()
def test_a_part_of_an_exported_model(name: str, part: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, 9, 3)
    whole = First(model).eval() if family.config else model
    graph = fhe_fx.trace(exported(whole, inputs[0], tmp_path / "model.onnx"))
    assert relative(graph(inputs[1]), whole(inputs[1])) < 1e-5
    encrypted = fhe_fx.encrypt_submodule(graph, part, calibration=inputs, options=FEW)
    fhe_fx.set_mode(encrypted, "clear")
    assert 0 < relative(encrypted(inputs[1]), whole(inputs[1])) < 0.1
    assert encrypted.get_submodule(part.replace(".", "_")).mode == "clear"


# Small files ----------------------------------------------------------------------------------


def written(nodes: list[Any], shape: list[Any], path: Path, **constants: Tensor) -> Path:
    """Write a model of one input `x` and one output `y`."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v.numpy(), k) for k, v in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor], Any]] = {
    "Reshape": ({}, {"c": torch.tensor([0, -1])}, lambda x: x.reshape(2, 12)),
    "Unsqueeze": ({}, {"c": torch.tensor([0, -1])}, lambda x: x[None, ..., None]),
    "Transpose": ({"perm": [0, 2, 1]}, {}, lambda x: x.transpose(1, 2)),
    "Slice": (
        {},
        {"c": torch.tensor([3]), "d": torch.tensor([-9]), "e": torch.tensor([2]),
         "f": torch.tensor([-2])},
        lambda x: x[..., [3, 1]],
    ),
    "Gather": ({"axis": 1}, {"c": torch.tensor([2, -1])}, lambda x: x[:, [2, 2]]),
    "ReduceMean": ({"keepdims": 0}, {"c": torch.tensor([-1])}, lambda x: x.mean(-1)),
    "Softmax": ({"axis": 1}, {}, lambda x: x.softmax(1)),
    "Clip": (
        {},
        {"c": torch.tensor(-0.5), "d": torch.tensor(0.25)},
        lambda x: x.clamp(-0.5, 0.25),
    ),
    "Gelu": ({"approximate": "tanh"}, {}, lambda x: nn.functional.gelu(x, approximate="tanh")),
    "Flatten": ({"axis": 2}, {}, lambda x: x.reshape(6, 4)),
    "Expand": ({}, {"c": torch.tensor([5, 1, 1, 4])}, lambda x: x.expand(5, 2, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_an_operator_is_what_the_standard_says(kind: str, tmp_path: Path) -> None:
    from onnx import helper

    attributes, constants, expected = CASES[kind]
    path = tmp_path / "one.onnx"
    node = helper.make_node(kind, ["x", *constants], ["y"], **attributes)
    graph = fhe_fx.trace(written([node], [2, 3, 4], path, **constants))
    x = torch.linspace(-1, 1, 24).view(2, 3, 4)
    torch.testing.assert_close(graph(x), expected(x))


def test_shapes_are_computed_while_reading(tmp_path: Path) -> None:
    from onnx import helper

    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=0, end=1),
        helper.make_node("Concat", ["s", "rest"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["y"], name="/body/flat/Reshape"),
    ]
    path = written(nodes, [2, 3, 4], tmp_path / "m.onnx", rest=torch.tensor([-1]))
    graph = fhe_fx.trace(path)
    assert [n.name for n in graph.graph.nodes] == ["x", "body_flat_Reshape", "output"]
    assert graph(torch.ones(2, 3, 4)).shape == (2, 12)


def test_refuses_all_unknown_operators_at_once(tmp_path: Path) -> None:
    from onnx import helper

    nodes = [
        helper.make_node("Einsum", ["x"], ["a"], name="first", equation="abc->ab"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Einsum", ["b"], ["c"], name="second", equation="ab->a"),
        helper.make_node("Loop", ["c"], ["y"], name="third"),
    ]
    with pytest.raises(UnsupportedOpError) as caught:
        fhe_fx.trace(written(nodes, [2, 3, 4], tmp_path / "m.onnx"))
    assert str(caught.value) == (
        "m.onnx: 2 operator(s) of ONNX have no translation.\n"
        "  Einsum  2 time(s), first in first\n"
        "  Loop  1 time(s), first in third\n"
        "Export the float model at opset 17 or later, without control flow or quantization."
    )


def test_refuses_dynamic_shapes(tmp_path: Path) -> None:
    from onnx import helper

    path = written([helper.make_node("Relu", ["x"], ["y"])], ["batch", 3], tmp_path / "m.onnx")
    with pytest.raises(CaptureError) as caught:
        fhe_fx.trace(path)
    assert str(caught.value) == (
        "m.onnx: the input x has the dynamic shape [batch, 3]; a circuit has one shape. Export "
        "without dynamic axes."
    )


def test_refuses_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    for path, message in (
        (tmp_path / "m.onnx", "cannot be read as an ONNX model"),
        (tmp_path / "n.onnx", "There is no file"),
        (tmp_path / "m.txt", "is neither a .pt2 file"),
    ):
        with pytest.raises(ModelError, match=message):
            fhe_fx.trace(path)

"""Capture, annotate, partition: the graph computes what the model does, or says why it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fhe_fx.capture import capture
from fhe_fx.errors import CaptureError
from fhe_fx.ir.ops import ENTER, LEAVE
from fhe_fx.ir.program import Program
from fhe_fx.passes import Annotate, Partition, Pipeline
from fhe_fx.passes.annotate import check_convex
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.passes.normalize import Normalize
from fhe_fx.passes.partition import ENCRYPTED
from tests.models import Mlp, shipped_gpt2, tiny_bert, tiny_gpt2, tiny_llama
from tests.programs import program_from

IDS = torch.tensor([[3, 17, 5, 17, 9]])
NO_CACHE = {"use_cache": False}


def _captured(model: nn.Module, path: str, inputs: tuple[Tensor, ...], **kwargs: Any) -> Program:
    return capture(model, inputs, kwargs, [path])


def _partitioned(model: nn.Module, path: str, *inputs: Tensor, **kwargs: Any) -> Program:
    program = _captured(model, path, inputs, **kwargs)
    Pipeline((Annotate(path), Partition())).run(program)
    return program


def _assert_equal(model: nn.Module, program: Program, *inputs: Tensor, **kwargs: Any) -> None:
    with torch.no_grad():
        expected = [
            leaf
            for leaf in pytree.tree_leaves(model(*inputs, **kwargs))
            if isinstance(leaf, Tensor)
        ]
        found = program.module(*inputs)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


TRANSFORMERS: list[tuple[str, Callable[[], Any], str, dict[str, Any]]] = [
    ("shipped", shipped_gpt2, "transformer.h.0.attn", NO_CACHE),
    ("shipped-block", shipped_gpt2, "transformer.h.2", NO_CACHE),
    ("gpt2-base", lambda: tiny_gpt2(is_base=True), "h.1.attn", NO_CACHE),
    ("gpt2-eager", lambda: tiny_gpt2(attention="eager"), "transformer.h.0.attn", NO_CACHE),
    ("gpt2-mlp", tiny_gpt2, "transformer.h.0.mlp", NO_CACHE),
    ("llama", tiny_llama, "layers.0.self_attn", NO_CACHE),
    ("llama-eager", lambda: tiny_llama("eager"), "layers.0.self_attn", NO_CACHE),
    ("llama-mlp", tiny_llama, "layers.0.mlp", NO_CACHE),
    ("bert", tiny_bert, "encoder.layer.0.attention", {}),
    ("bert-self", tiny_bert, "encoder.layer.0.attention.self", {}),
    ("bert-eager", lambda: tiny_bert("eager"), "encoder.layer.1.attention", {}),
]


@pytest.mark.parametrize(
    ("make", "path", "kwargs"), [c[1:] for c in TRANSFORMERS], ids=[c[0] for c in TRANSFORMERS]
)
def test_partition_equals_the_model(
    make: Callable[[], Any], path: str, kwargs: dict[str, Any]
) -> None:
    model = make()
    program = _partitioned(model, path, IDS, **kwargs)
    _assert_equal(model, program, IDS, **kwargs)
    region = program.module.get_submodule(ENCRYPTED)
    assert isinstance(region, torch.fx.GraphModule)
    targets = [n.target for n in region.graph.nodes]
    assert targets.count(LEAVE) == 1
    assert ENTER in targets
    assert sum(n.op == "placeholder" for n in region.graph.nodes) == 1  # masks are constants
    inside = [n for n in region.graph.nodes if n.op == "call_function"]
    assert all(path in n.meta["module_stack"] for n in inside)
    assert any(n.meta.get("source", "").startswith("modeling_") for n in inside)


@pytest.mark.parametrize("path", ["inner", "inner.1", "head"])
def test_a_plain_network_and_its_nested_parts(path: str) -> None:
    model, x = Mlp().eval(), torch.linspace(-1, 1, 12).reshape(2, 6)
    _assert_equal(model, _partitioned(model, path, x), x)


def test_capture_leaves_no_hooks_and_no_changes() -> None:
    model = tiny_gpt2()
    before = copy.deepcopy(model.state_dict())
    capture(model, (IDS,), NO_CACHE, ["transformer.h.0.attn"])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(torch.relu(self.part(x)))  # type: ignore[no-any-return]


def test_a_module_called_twice_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        _partitioned(_Twice(), "part", torch.ones(1, 4))
    assert str(caught.value) == (
        "part is called 2 times in one forward pass; a circuit holds one call. "
        "Encrypt a part that is called once."
    )


class _Ends(nn.Module):
    """A container: its children are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)


class _Interrupted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ends, self.between = _Ends(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.ends.last(self.between(self.ends.first(x)))  # type: ignore[no-any-return]


def test_a_container_that_is_never_called_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"^ends: nothing of this submodule is in the captured"):
        _partitioned(_Interrupted(), "ends", torch.ones(1, 4))


def test_a_region_with_something_between_its_parts_is_refused() -> None:
    program = _captured(_Interrupted(), "ends", (torch.ones(1, 4),))
    for node in program.graph.nodes:
        path = node.meta.get("module_path", "")
        node.meta["encrypted"] = node.op == "call_function" and path.startswith("ends")
    with pytest.raises(CaptureError) as caught:
        check_convex(program, "ends")
    first, listed, last = str(caught.value).splitlines()
    assert first == (
        "ends is not one region: 1 node(s) outside it lie between two of its parts, and a circuit "
        "cannot stop for the client."
    )
    assert listed.startswith("  linear_1  between  ")
    assert last == "Encrypt a submodule that contains these too, or two separate ones."


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.part(x)  # type: ignore[no-any-return]
        return x


def test_data_dependent_control_flow_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        _captured(_Branches(), "part", (torch.ones(1, 4),))
    text = str(caught.value)
    assert text.startswith("_Branches branches on the values of its tensors (test_export.py:")
    assert text.endswith(
        "; a circuit has no branches. Replace the branch by torch.where, or encrypt a submodule "
        "that does not contain it."
    )


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)  # type: ignore[no-any-return]


def test_a_submodule_that_is_not_called_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        _partitioned(_Unused(), "part", torch.ones(1, 4))
    assert str(caught.value) == (
        "part: nothing of this submodule is in the captured graph: its result is not used, or does "
        "not depend on the model's input. Choose another target."
    )


def test_a_model_that_fails_on_its_example_is_reported_in_one_sentence() -> None:
    with pytest.raises(CaptureError) as caught:
        _captured(Mlp(), "inner", (torch.ones(1, 5),))
    text = str(caught.value)
    assert text.startswith("torch.export cannot capture Mlp: ")
    assert "\n" not in text
    assert text.endswith(
        "Check that the model runs on the example inputs, and that its forward is exportable."
    )


@pytest.mark.parametrize(
    "module",
    [nn.Softplus(beta=2, threshold=5), nn.Mish(), nn.CELU(alpha=2.0), nn.LogSigmoid()],
    ids=lambda m: type(m).__name__,
)
def test_a_function_without_overflow_is_captured_whole(module: nn.Module) -> None:
    x = torch.tensor([[-300.0, -1.0, 0.0, 2.6, 120.0, 300.0]])  # exp overflows above 88
    program = program_from(module, [(x,)])
    Pipeline((Normalize(), Calibrate())).run(program)  # which refuses values that are not finite
    assert [n.op for n in program.encrypted()] == ["placeholder", "call_module"]
    torch.testing.assert_close(program(x)[0], module(x), rtol=0, atol=0)

"""A capture that ends behind its targets: the same regions, or the whole model where it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx.capture import capture
from fhe_fx.capture.marks import marked
from fhe_fx.capture.reads import Reads, leaves_read
from fhe_fx.errors import CaptureError
from fhe_fx.ir.program import Program
from fhe_fx.passes import Annotate, Partition, Pipeline
from fhe_fx.passes.partition import ENCRYPTED
from tests.models import tiny_bert, tiny_gpt2, tiny_llama

IDS = torch.tensor([[3, 17, 5, 17, 9]])
NO_CACHE = {"use_cache": False}
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def _region(model: nn.Module, path: str, *, is_whole: bool, **kwargs: Any) -> str:
    program = capture(model, (IDS,), kwargs, [path], is_whole=is_whole)
    Pipeline((Annotate(path), Partition())).run(program)
    region = program.module.get_submodule(ENCRYPTED)
    assert isinstance(region, torch.fx.GraphModule)
    return str(Program(region))


MODELS: list[tuple[str, Callable[[], Any], str, dict[str, Any]]] = [
    ("gpt2", tiny_gpt2, "transformer.h.0.attn", NO_CACHE),
    ("gpt2-block", tiny_gpt2, "transformer.h.1", NO_CACHE),
    ("gpt2-eager", lambda: tiny_gpt2(attention="eager"), "transformer.h.0.attn", NO_CACHE),
    ("llama", tiny_llama, "layers.0.self_attn", NO_CACHE),
    ("llama-eager", lambda: tiny_llama("eager"), "layers.0.self_attn", NO_CACHE),
    ("bert-eager", lambda: tiny_bert("eager"), "encoder.layer.0.attention.self", {}),
]


@pytest.mark.parametrize(
    ("make", "path", "kwargs"), [c[1:] for c in MODELS], ids=[c[0] for c in MODELS]
)
def test_the_region_is_that_of_the_whole_model(
    make: Callable[[], Any], path: str, kwargs: dict[str, Any]
) -> None:
    model = make()
    whole = _region(model, path, is_whole=True, **kwargs)
    assert _region(model, path, is_whole=False, **kwargs) == whole


def test_what_follows_the_last_target_is_not_traced() -> None:
    model = tiny_gpt2()
    targets = ["transformer.h.0.mlp", "transformer.h.0.attn"]
    program = capture(model, (IDS,), NO_CACHE, targets, is_whole=False)
    paths = {str(n.meta.get("module_path", "")) for n in program.graph.nodes}
    assert any(p.startswith("transformer.h.0.mlp") for p in paths)
    assert not any(p.startswith(("transformer.h.1", "lm_head")) for p in paths)
    assert "forward" not in vars(model)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model(IDS).logits.shape[1] == IDS.shape[1]


class _Part(nn.Module):
    """Returns two tensors and a number, and keeps a third tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kept = torch.zeros(())
        self.register_buffer("written", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        y = self.linear(x)
        self.kept = y.exp()
        return y.relu(), {"more": y.tanh(), "number": 3}


class _Model(nn.Module):
    """Uses its part as it is told."""

    def __init__(self, use: Callable[[_Part, Tensor], Any]) -> None:
        super().__init__()
        self.part, self.use = _Part(), use

    def forward(self, x: Tensor) -> Any:
        return self.use(self.part, x * 2)


def _reads(use: Callable[[_Part, Tensor], Any]) -> Reads | None:
    model = _Model(use).eval()
    with marked(model, ["part"]):
        return leaves_read(model, (X,), {}, ["part"])


def _in_place(part: _Part, x: Tensor) -> Tensor:
    part.linear.register_forward_hook(lambda m, a, out: part.written.add_(out))  # type: ignore[operator]
    result: Tensor = part(x)[0]
    return result


USES: list[tuple[str, Callable[[_Part, Tensor], Any], list[int] | None]] = [
    ("one is returned", lambda part, x: part(x)[0], [0]),
    ("one is computed with", lambda part, x: part(x)[1]["more"] + x, [1]),
    ("both", lambda part, x: part(x), [0, 1]),
    ("a view of one", lambda part, x: part(x)[0].T.reshape(-1)[1:], [0]),
    ("its input is read behind it", lambda part, x: part(x)[0] + x, [0]),
    ("none", lambda part, x: (part(x), x)[1], None),
    ("what it keeps is read", lambda part, x: part(x)[0] + part.kept, None),
    ("what it keeps is returned", lambda part, x: (part(x)[0], part.kept), None),
    ("it is called twice", lambda part, x: part(part(x)[0])[0], None),
    ("it writes to a buffer", _in_place, None),
    ("something unknown is returned", lambda part, x: (part(x)[0], object()), None),
    ("it fails", lambda part, x: part(x)[5], None),
]


@pytest.mark.parametrize(("use", "expected"), [u[1:] for u in USES], ids=[u[0] for u in USES])
def test_reads_of_a_part(use: Callable[[_Part, Tensor], Any], expected: list[int] | None) -> None:
    assert _reads(use) == (None if expected is None else {"part": expected})


def test_values_that_leave_by_another_way_are_refused_as_before() -> None:
    model = _Model(lambda part, x: part(x)[0] + part.kept).eval()
    with pytest.raises(CaptureError, match="not among the module's results"):
        fhe_fx.encrypt_submodule(model, "part", calibration=[X, X + 0.1])


def test_what_cannot_be_captured_behind_a_target_does_not_matter() -> None:
    def branch(part: _Part, x: Tensor) -> Tensor:
        y: Tensor = part(x)[0]
        return y if float(y.sum()) > 0 else -y

    model = _Model(branch).eval()
    with pytest.raises(CaptureError, match="branches on the values"):
        capture(model, (X,), {}, ["part"])
    encrypted = fhe_fx.encrypt_submodule(model, "part", calibration=[X, X + 0.1, X - 0.1])
    fhe_fx.set_mode(encrypted, "clear")
    with torch.no_grad():
        torch.testing.assert_close(encrypted(X), model(X), atol=0.1, rtol=0.1)

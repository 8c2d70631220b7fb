"""The example of a published idea: what it computes, what it leaves alone, what it draws."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fhe_fx.errors import PassError
from fhe_fx.ir import Program
from fhe_fx.passes import Pass, Pipeline, base, default_pipeline
from fhe_fx.passes.normalize import Normalize
from fhe_fx.testing import assert_cost, program_from, seeded

EXAMPLE = Path(__file__).parents[2] / "examples" / "relu_softmax"
MODEL = EXAMPLE.parent / "gpt2" / "model"
SHAPES = ("relu", "square", "exp")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """Import the pass; afterwards nothing of it is left."""
    known = dict(base._REGISTRY)
    yield load("relu_softmax")
    base._REGISTRY.clear()
    base._REGISTRY.update(known)
    for name in ("relu_softmax", "shapes"):
        sys.modules.pop(name, None)


def attention(x: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x, 2 * x, x, is_causal=True)


def normal(function: Any, *shape: int) -> Program:
    program = program_from(function, [(x,) for x in seeded(shape)], n_bits=6)
    Pipeline((Normalize(),)).run(program)
    return program


def with_pass(example: Any, shape: str) -> Pass:
    found: Pass = example.ReluSoftmax(shape)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_near_the_softmax_and_sum_to_one(example: Any, shape: str) -> None:
    given, program = (normal(lambda x: x.softmax(-1), 1, 3, 6) for _ in range(2))
    Pipeline((with_pass(example, shape),)).run(program)
    assert "masked_softmax(" not in str(program)
    for x in seeded((1, 3, 6), n=8, seed=9):  # others than those it was fitted to
        (expected,), (found,) = given(x), program(x)
        assert torch.allclose(found.sum(-1), torch.ones(1, 3), atol=1e-5)
        # Closer than weights that are all alike, which is what knowing nothing gives.
        assert (found - expected).norm() < (expected - 1 / 6).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_two_keys_are_a_sigmoid_that_one_function_approaches(example: Any, shape: str) -> None:
    """With two keys the centred score tells the weight; only the shape is at fault, and clearly."""
    given, program = (normal(lambda x: x.softmax(-1), 1, 4, 2) for _ in range(2))
    Pipeline((with_pass(example, shape),)).run(program)
    inputs = seeded((1, 4, 2), n=16, seed=9)
    expected, found = (torch.cat([p(x)[0] for x in inputs]) for p in (given, program))
    alike = (expected - expected.mean(0)).square().sum()
    assert (found - expected).square().sum() < 0.25 * alike  # three quarters of it explained


def test_it_costs_one_look_up_for_each_key_but_the_first(example: Any) -> None:
    """The weight of the first key is a sum of six bits more, read through one look-up."""
    for shape in SHAPES:
        program = program_from(
            lambda x: x.softmax(-1), [(x,) for x in seeded((1, 1, 6))], 4, p_error=0.1
        )
        passes = default_pipeline().insert_before("lower-softmax", with_pass(example, shape))
        passes.run(program)
        assert_cost(program, look_ups=5 + 1, bits=6)


def test_causal_attention_keeps_its_rows(example: Any) -> None:
    """The first row has one live key, which takes all the weight."""
    program = normal(attention, 1, 2, 5, 4)
    passes = default_pipeline().insert_before("lower-softmax", with_pass(example, "relu"))
    passes.drop("normalize").run(program)
    assert [tuple(n.meta["val"].shape) for n in program.results] == [(1, 2, 5, 4)]


def test_what_it_leaves_alone(example: Any) -> None:
    masked = torch.tensor([[True, False, True], [False, True, True]])

    def crossed(x: Tensor) -> Tensor:
        return x.masked_fill(~masked, -torch.inf).softmax(-1)

    for function, reason in (
        (lambda x: x.log_softmax(-1), "it is a log-softmax"),
        (crossed, "its rows have no key in common with the first"),
    ):
        program = normal(function, 1, 2, 3)
        (record,) = Pipeline((with_pass(example, "relu"),)).run(program)
        assert not record.has_changed
        assert [n.reason for n in program.notes] == [reason]


def test_refuses_a_shape_that_there_is_not(example: Any) -> None:
    with pytest.raises(PassError, match=r"shape='cube' is not one of relu, square, exp"):
        Pipeline((with_pass(example, "cube"),)).run(normal(attention, 1, 1, 3, 4))


def test_the_comparison_measures_and_draws(
    example: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    monkeypatch.setattr(sys, "path", [*sys.path])
    few = ["--tokens", "3", "--n-bits", "4", "--shapes", "softmax", "relu", "--sentences", "8"]
    few += ["--calibration", "64"]
    monkeypatch.setattr(sys, "argv", ["shapes.py", str(MODEL), *few, "--out", str(tmp_path)])
    load("shapes").main()
    softmax, relu = json.loads((tmp_path / "cost.json").read_text())
    assert relu["look_ups"] < softmax["look_ups"]
    assert 0 < softmax["error"] < relu["error"] < 1
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert "squared ReLU" in (tmp_path / "cost.svg").read_text()
    assert f"wrote {tmp_path / 'cost.png'}" in capsys.readouterr().out

"""The float remainder and the circuit as ONNX models: run together they are the clear mode."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.capture import capture
from fhe_fx.cli import app
from fhe_fx.errors import ArtifactError, BackendError, TargetError
from fhe_fx.export import read_manifest
from fhe_fx.export.manifest import ONNX_FORMAT
from fhe_fx.export.onnx import AFTER, BEFORE, INTEGERS, ONNX_FILES, export_onnx, remainder
from fhe_fx.export.onnx import validate as validate_module
from fhe_fx.export.onnx.remainder import Half
from fhe_fx.export.onnx.rounding import rounded_results
from fhe_fx.export.onnx.validate import run_model, session
from fhe_fx.runtime.codec import Codec
from tests.export.conftest import make_inputs, make_net
from tests.models import (
    FEW,
    SHIPPED,
    Mlp,
    mlp_inputs,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    token_inputs,
)

ROOT = Path(__file__).parents[3]


def run_directory(directory: Path, **inputs: Tensor) -> dict[str, Any]:
    """Run the three models in order and return every value by name."""
    values = {name: x.numpy() for name, x in inputs.items()}
    for name in (BEFORE, INTEGERS, AFTER):
        values |= run_model(session((directory / name).read_bytes()), values)
    return values


def _halves(encrypted: Any) -> tuple[Half, Half]:
    region = encrypted_modules(encrypted)[0].region
    assert region.call is not None
    fhe_fx.set_mode(encrypted, "disable")
    return remainder(
        capture(encrypted, region.call.args, region.call.kwargs, [region.name]), region
    )


def encrypt_tokens(model: Any, target: str, **choices: Any) -> Any:
    return fhe_fx.encrypt_submodule(model, target, max_tokens=4, options=FEW, **choices)


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@pytest.mark.parametrize(
    ("make", "target", "heads"),
    [
        (tiny_gpt2, "h.0.attn", [1]),  # a region with a float part of its own on both sides
        (tiny_llama, "layers.1.self_attn", None),
        (tiny_bert, "layer.0.output", None),  # two inputs, both computed before
    ],
)
def test_three_models_are_the_clear_mode(
    make: Callable[[], Any], target: str, heads: list[int] | None, tmp_path: Path
) -> None:
    held_out = token_inputs(12)[8:]
    given = [{"input_ids": ids} for ids in token_inputs(8)]
    encrypted = encrypt_tokens(make(), target, heads=heads, calibration=given)
    manifest = export_onnx(encrypted, tmp_path / "onnx")
    assert manifest["validation"]["is_integer_equal"]
    assert 0 < manifest["validation"]["float_error_of_allowed"] <= 1
    before, after = _halves(encrypted)
    fhe_fx.set_mode(encrypted, "clear")
    codec = Codec.of(encrypted_modules(encrypted)[0].region.program)
    for ids in held_out:
        values = run_directory(tmp_path / "onnx", input_ids=ids)
        with torch.no_grad():
            expected = _first(encrypted(ids, use_cache=False))
        # What is encoded alike gives the same integers, so that only floats can differ.
        assert [values[f"encoded_{k}"].shape for k in range(len(codec.inputs))] == [
            p.shape for p in codec.inputs
        ]
        given_after = [torch.as_tensor(values[n]) for n in after.inputs]
        (result, *_) = rounded_results(after.module, given_after)
        for found in (torch.from_numpy(values["output_0"]), expected):
            assert float((found.double() - result.exact).abs().max()) <= result.bound
        inputs = [torch.as_tensor(values[n]) for n in before.inputs]
        for k, number in enumerate(rounded_results(before.module, inputs)[: len(codec.inputs)]):
            kind = codec.inputs[k].type
            off = torch.from_numpy(values[f"encoded_{k}"]) - number.exact.clamp(kind.low, kind.high)
            assert float(off.abs().max()) <= 0.5 + number.bound


def test_heads_that_stay_with_the_client_keep_their_clear_mask(tmp_path: Path) -> None:
    def padded(ids: Tensor, n: int) -> dict[str, Tensor]:
        return {"input_ids": ids, "attention_mask": (torch.arange(4) >= n).long()[None]}

    encrypted = encrypt_tokens(
        tiny_gpt2(attention="eager"),
        "h.0.attn",
        heads=[1],
        clear_inputs="attention_mask",
        calibration=[padded(ids, i % 2) for i, ids in enumerate(token_inputs(8))],
    )
    manifest = export_onnx(encrypted, tmp_path / "onnx")
    assert manifest["validation"]["is_integer_equal"]
    fhe_fx.set_mode(encrypted, "clear")
    call = padded(token_inputs(9)[8], 1)
    with torch.no_grad():
        expected = encrypted(**call, use_cache=False).logits
    values = run_directory(tmp_path / "onnx", **call)
    # A float between two integers may be encoded as either: one step of one number.
    found = torch.from_numpy(values["output_0"])
    assert float((found - expected).norm() / expected.norm()) < 0.01


def test_encoding_and_decoding_are_those_of_the_codec(tmp_path: Path) -> None:
    """Where nothing is float but the codec, even the encoding is equal bit for bit."""
    body = make_net().body
    encrypted = fhe_fx.encrypt_submodule(
        nn.Sequential(body), "0", n_bits=4, calibration=make_inputs()
    )
    (module,) = encrypted_modules(encrypted)
    export_onnx(encrypted, tmp_path / "onnx")
    codec = Codec.of(module.region.program)
    for gain in (0.9, 50.0):  # inside the range, and clipped at its ends
        x = gain * make_inputs()[5] + 0.0137
        values = run_directory(tmp_path / "onnx", **{_input_name(tmp_path / "onnx"): x})
        for k, encoded in enumerate(codec.encode([x])):
            np.testing.assert_array_equal(values[f"encoded_{k}"], encoded)
        (expected,) = module.region.run_circuit([x], "clear")
        np.testing.assert_array_equal(values["output_0"], expected.numpy())


def _input_name(directory: Path) -> str:
    return str(onnx.load(directory / BEFORE).graph.input[0].name)


class Reserved(nn.Module):
    """Its argument has a name that the models use, its input is read after the circuit, and one
    of its results is a constant.
    """  # noqa: D205

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))
        self.register_buffer("bias", torch.arange(6.0))

    bias: Tensor

    def forward(self, result_0: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(2 * result_0) + result_0, self.bias * 2


def test_names_are_unique_and_inputs_read_later_are_not_computed(tmp_path: Path) -> None:
    encrypted = fhe_fx.encrypt_submodule(Reserved(), "body", calibration=mlp_inputs())
    export_onnx(encrypted, tmp_path / "onnx")
    before, after = (onnx.load(tmp_path / "onnx" / name) for name in (BEFORE, AFTER))
    assert [i.name for i in before.graph.input] == ["result_0_"]
    assert [o.name for o in before.graph.output] == ["encoded_0"]
    assert [i.name for i in after.graph.input] == ["result_0", "result_0_"]
    values = run_directory(tmp_path / "onnx", result_0_=mlp_inputs()[3])
    np.testing.assert_array_equal(values["output_1"], 2 * np.arange(6.0))
    fhe_fx.set_mode(encrypted, "clear")
    expected = encrypted(mlp_inputs()[3])[0].detach().numpy()
    _, half = _halves(encrypted)
    given = [torch.as_tensor(values[n]) for n in half.inputs]
    (result, _) = rounded_results(half.module, given)
    assert np.abs(values["output_0"] - expected).max() <= result.bound


def test_what_is_written(tmp_path: Path) -> None:
    encrypted = fhe_fx.encrypt_submodule(Mlp(), "inner", calibration=mlp_inputs())
    out = tmp_path / "onnx"
    manifest = export_onnx(encrypted, out, origin="mlp")
    assert read_manifest(out, format=ONNX_FORMAT) | {"sha256": None} == manifest | {"sha256": None}
    assert manifest["origin"] == "mlp"
    assert manifest["module_path"] == "inner"
    assert "lower-to-integers" in manifest["passes"]
    held = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert held == sorted([*ONNX_FILES, "manifest.json"])
    for name in ONNX_FILES:
        onnx.checker.check_model(onnx.load(out / name), full_check=True)
    first = (out / INTEGERS).read_bytes()
    export_onnx(encrypted, out)  # replaces what it wrote, with the same bytes
    assert (out / INTEGERS).read_bytes() == first
    assert encrypted_modules(encrypted)[0].mode == "disable"


# What is refused ------------------------------------------------------------------------------


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    encrypted = fhe_fx.encrypt_submodule(Mlp(), "inner", calibration=mlp_inputs())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=re.escape("holds 'notes.txt', which no export wrote")):
        export_onnx(encrypted, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_two_encrypted_parts_and_none(tmp_path: Path) -> None:
    encrypted = fhe_fx.encrypt_submodule(Mlp(), ["inner", "head"], calibration=mlp_inputs())
    with pytest.raises(TargetError) as caught:
        export_onnx(encrypted, tmp_path / "onnx")
    assert str(caught.value) == (
        "Mlp has 2 encrypted parts (inner, head); an ONNX export holds one. Encrypt each in a "
        "model of its own."
    )
    with pytest.raises(TargetError, match=r"^Mlp has no encrypted part\."):
        export_onnx(Mlp(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_model_in_double_precision(tmp_path: Path) -> None:
    inputs = [x.double() for x in mlp_inputs()]
    encrypted = fhe_fx.encrypt_submodule(Mlp().double(), "inner", calibration=inputs)
    with pytest.raises(BackendError) as caught:
        export_onnx(encrypted, tmp_path / "onnx")
    assert str(caught.value) == (
        "Mlp computes in torch.float64; its ONNX models are float32. Call model.float() before it "
        "is encrypted."
    )


class Special(nn.Module):
    """Its float part has an operator that ONNX lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp().inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.special.bessel_j0(self.body(x))
        return y


def test_an_operator_without_counterpart_is_named(tmp_path: Path) -> None:
    encrypted = fhe_fx.encrypt_submodule(Special(), "body", calibration=mlp_inputs())
    with pytest.raises(BackendError) as caught:
        export_onnx(encrypted, tmp_path / "onnx")
    message = str(caught.value)
    assert message.startswith("after body: PyTorch's ONNX exporter refuses it: ")
    assert "special_bessel_j0" in message
    assert "\n" not in message
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (INTEGERS, "inner: in ONNX Runtime 1 of 6 integers of result_0 differ from the reference"),
        (AFTER, "inner: ONNX Runtime's output_0 differs from PyTorch's by "),
        (BEFORE, "inner: ONNX Runtime encodes 1 of 6 numbers of encoded_0 differently"),
    ],
)
def test_a_model_that_computes_something_else_is_not_written(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypted = fhe_fx.encrypt_submodule(Mlp(), "inner", calibration=mlp_inputs())
    changed = {INTEGERS: ("result_0", 1), AFTER: ("output_0", 1e-4), BEFORE: ("encoded_0", 1)}[name]
    run = validate_module.run_model

    def wrong(model: Any, values: Any) -> Any:
        found = run(model, values)
        if changed[0] in found:
            found[changed[0]] = found[changed[0]].copy()
            found[changed[0]].reshape(-1)[0] += changed[1]
        return found

    monkeypatch.setattr(validate_module, "run_model", wrong)
    with pytest.raises(BackendError) as caught:
        export_onnx(encrypted, tmp_path / "onnx")
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


# Command line and client ----------------------------------------------------------------------


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_export_of_a_model_and_a_client_without_pytorch(tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    part = ["--submodule", "h.0.attn", "--heads", 0, "--tokens", 6]
    result = invoke("export", SHIPPED, *part, "--onnx", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["onnx"] == str(out)
    assert "validated in ONNX Runtime: integers equal on 6 samples" in result.stderr
    client = ROOT / "examples" / "onnx_client" / "client.py"
    code = (
        "import runpy, sys; sys.modules.update(torch=None, fhe_fx=None, transformers=None);"
        f"sys.argv = ['client', {str(out)!r}, {str(SHIPPED)!r}, 'He had never'];"
        f"runpy.run_path({str(client)!r}, run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.stderr == ""
    assert run.stdout.startswith("He had never ")
    # The same text as the encrypted model writes in clear mode, window by window.
    assert run.stdout.strip() == _written_in_clear("He had never", 5, tokens=6)


def _written_in_clear(prompt: str, n: int, tokens: int) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(SHIPPED)
    encrypted: Any = fhe_fx.encrypt_submodule(model, "h.0.attn", heads=[0], max_tokens=tokens)
    fhe_fx.set_mode(encrypted, "clear")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(n):
        with torch.no_grad():
            scores = encrypted(ids[:, -tokens:], use_cache=False).logits[0, -1]
        ids = torch.cat([ids, scores.argmax().reshape(1, 1)], 1)
    return str(tokenizer.decode(ids[0]))


def test_export_of_a_pt2_file(tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.config.use_cache = False
    exported = torch.export.export(model, (token_inputs()[0],), strict=False)
    torch.export.save(exported, tmp_path / "m.pt2")
    out = tmp_path / "onnx"
    result = invoke("export", tmp_path / "m.pt2", "--submodule", "h.0.mlp", "--onnx", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    values = run_directory(out, **{_input_name(out): token_inputs()[1]})
    with torch.no_grad():
        expected = model(token_inputs()[1]).logits.numpy()
    error = np.linalg.norm(values["output_0"] - expected) / np.linalg.norm(expected)
    assert error < 0.2  # of quantization


def test_nowhere_to_write() -> None:
    result = invoke("export", SHIPPED, "--submodule", "h.0.attn")
    assert result.exit_code == 2
    assert result.stderr == "error: Give where to write: --out DIR, --onnx DIR, or both.\n"


def test_halves_hold_no_weight_of_the_encrypted_part() -> None:
    encrypted = fhe_fx.encrypt_submodule(Mlp(), "inner", calibration=mlp_inputs())
    region = encrypted_modules(encrypted)[0].region
    assert region.call is not None
    whole = capture(encrypted, region.call.args, region.call.kwargs, ["inner"])
    secret = {w.numel(): w for w in Mlp().inner.state_dict().values()}
    for half in remainder(whole, region):
        for tensor in half.module.state_dict().values():
            held = secret.get(tensor.numel())
            assert held is None or not torch.allclose(held.reshape(-1), tensor.reshape(-1).float())

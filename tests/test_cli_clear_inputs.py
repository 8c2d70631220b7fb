"""`--clear-input`: the same option of every command that lowers, for models and for graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.test_clear_inputs import CHANNELS, ROWS, Heads, Whole, booleans
from tests.test_cli import SHIPPED, invoke, refused

PART = ["--submodule", "h.0.attn", "--heads", "1", "--tokens", "3"]
MASKED = ["--clear-input", "attention_mask"]


@pytest.fixture(scope="module", autouse=True)
def texts_kept_apart(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An array for each argument of a language model; the first token may be padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 100, (24, 3))
    mask = np.arange(3) >= rng.integers(0, 2, (24, 1))
    path = tmp_path_factory.mktemp("calls") / "calls.npz"
    np.savez(path, input_ids=ids, attention_mask=mask.astype(np.int64))
    return path


@pytest.fixture(scope="module")
def look_ups(calls: Path) -> int:
    """Those of one head under a clear mask, which are more than under a constant one."""
    np.save(calls.with_name("ids.npy"), np.load(calls)["input_ids"])
    wanted = ("report", SHIPPED, *PART, "--json", "--backend", "reference", "--calibration")
    result = invoke(*wanted, calls, *MASKED)
    assert result.exit_code == 0, result.stderr
    (masked,) = json.loads(result.stdout)["regions"]
    (constant,) = json.loads(invoke(*wanted, calls.with_name("ids.npy")).stdout)["regions"]
    assert masked["look_ups"] > constant["look_ups"]  # pairs that a clear mask may show are built
    return int(masked["look_ups"])


def of_command(command: str, found: dict[str, Any]) -> int:
    if command == "evaluate":
        return int(found["settings"][0]["look_ups"])
    if command == "inspect":
        return sum(node["look_ups"] for node in found["regions"][0]["nodes"])
    return int(found["report"]["regions"][0]["look_ups"])


@pytest.mark.parametrize("command", ["generate", "inspect", "evaluate"])
def test_commands_on_text_take_clear_masks(
    command: str, calls: Path, look_ups: int, tmp_path: Path
) -> None:
    more = {
        "generate": ["--prompt", "He had", "--max-new-tokens", 2],
        "inspect": ["--sentences", 4],
        "evaluate": ["--sentences", 4, "--modes", "clear", "--out", tmp_path / "out"],
    }[command]
    given = (command, SHIPPED, *PART, *MASKED, "--calibration", calls, *more, "--json")
    result = invoke(*given)
    assert result.exit_code == 0, result.stderr
    assert of_command(command, json.loads(result.stdout)) == look_ups


def test_refuses_clear_inputs_that_are_none(calls: Path) -> None:
    given = ("report", SHIPPED, *PART, "--backend", "reference", "--clear-input")
    told = refused(*given, "attention_maks", "--calibration", calls)
    assert "has no argument 'attention_maks'. Did you mean 'attention_mask'" in told
    assert refused(*given, "attention_mask") == (
        "error: transformer.h.0.attn: kwargs['attention_mask'] does not depend on what calibration "
        "gives, so it is a constant of the circuit. Give calibration inputs with it, each argument "
        "by name, or leave clear_inputs out."
    )


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model under a mask as two files, and calls of it."""
    place, generator = tmp_path_factory.mktemp("graphs"), torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model, x = Whole(Heads()).eval(), torch.randn(24, ROWS, CHANNELS, generator=generator)
    masks = torch.cat([booleans(generator) for _ in x])
    example = (x[:1], masks[:1])
    torch.export.save(torch.export.export(model, example), place / "model.pt2")
    torch.onnx.export(
        model, example, place / "model.onnx", dynamo=True, verbose=False, input_names=["x", "mask"]
    )
    np.savez(place / "calls.npz", x=x.numpy(), mask=masks.numpy())
    np.savez(place / "wrong.npz", x=x.numpy(), msk=masks.numpy())
    return place


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("part", [["part", "--heads", 1], ["part"], [""]])
@pytest.mark.parametrize("file", ["model.pt2", "model.onnx"])
def test_graphs_know_their_inputs_by_name(file: str, part: list[Any], graphs: Path) -> None:
    """Also where a part is given something that the graph made of an input."""
    given = ("report", graphs / file, "--submodule", *part, "--json", "--backend", "reference")
    calls = ("--calibration", graphs / "calls.npz")
    result = invoke(*given, *calls, "--clear-input", "mask")
    assert result.exit_code == 0, result.stderr
    (region,) = json.loads(result.stdout)["regions"]
    assert region["look_ups"] > 0
    assert "Its arguments: x, mask." in refused(*given, *calls, "--clear-input", "maks")
    told = refused(*given, "--calibration", graphs / "wrong.npz", "--clear-input", "mask")
    assert told == (
        f"error: {graphs / 'wrong.npz'}: the graph has no input 'msk'. Did you mean 'mask'? The "
        f"graph takes x [1, 3, 4], mask [1, 3, 3]."
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_refuses_calls_that_no_graph_takes(graphs: Path) -> None:
    given = ("report", graphs / "model.onnx", "--submodule", "part", "--clear-input", "mask")
    takes = "The graph takes x [1, 3, 4], mask [1, 3, 3]."
    assert refused(*given) == (
        f"error: {graphs / 'model.onnx'} is run as a graph, which writes no calibration inputs of "
        f"its own. Give them: --calibration x.npy, an array [n, *input shape], or a .npz with an "
        f"array for each of x, mask."
    )
    assert refused(*given, "--tokens", 2) == (
        "error: --tokens 2: the graph takes [1, 3, 4] and [1, 3, 3], and shapes are fixed in a "
        ".pt2 or .onnx. Leave --tokens out, or export with 2 tokens."
    )
    arrays = dict(np.load(graphs / "calls.npz"))
    np.save(graphs / "x.npy", arrays["x"])
    np.savez(graphs / "short.npz", x=arrays["x"][:, :2], mask=arrays["mask"])
    assert refused(*given, "--calibration", graphs / "x.npy") == (
        f"error: {graphs / 'x.npy'} holds no array for the input 'mask'. {takes} Give a .npz with "
        f"an array for each."
    )
    assert refused(*given, "--calibration", graphs / "short.npz") == (
        f"error: {graphs / 'short.npz'}: rows of 'x' have shape [2, 4]. {takes}"
    )
    assert refused("inspect", *given[1:]).startswith(
        f"error: {graphs / 'model.onnx'} holds a graph, which has one length and no tokenizer;"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_exported_program_under_a_clear_mask_is_written_for_two(
    graphs: Path, tmp_path: Path
) -> None:
    given = (graphs / "model.pt2", "--submodule", "part", "--clear-input", "mask")
    calls = ("--calibration", graphs / "calls.npz")
    result = invoke("export", *given, *calls, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["validation"]["is_clear_equal"]

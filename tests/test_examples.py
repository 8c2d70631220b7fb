"""The examples run, on little: what they print comes from the package as it is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    return _load(path).main()


@pytest.mark.fhe
def test_the_demonstration_writes_and_executes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--heads", 0, "--tokens", 3, "--new-tokens", 1, "--prompt", "It was a"]
    _run(EXAMPLES / "gpt2" / "demo.py", monkeypatch, *few, "--n-bits", 3, "--low-bits", 1)
    lines = capsys.readouterr().out.splitlines()
    assert "'It was a'" in lines
    assert any(line.startswith("  float   '") for line in lines)
    assert any(line.startswith("  3 bits  '") for line in lines)
    assert any(line.startswith("  1 bits  '") for line in lines)
    assert any("executing on ciphertexts, 1 new token: 1 run of 3 tokens" in x for x in lines)
    assert lines[-1].startswith("encrypted   ")


def test_the_harness_drives_an_encrypted_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    path = EXAMPLES / "lm_eval" / "cloze.py"
    _run(path, monkeypatch, "--submodule", "h.0.mlp", "--n-bits", 8, "--sentences", 40)
    first, exact, clear = capsys.readouterr().out.splitlines()
    assert first == "40 questions, four answers each"
    # At eight bits one question in forty may be answered otherwise than in float, a near tie.
    accuracies = [float(line.split()[-3].rstrip("%")) for line in (exact, clear)]
    assert 25 < accuracies[0] < 100  # better than chance
    assert abs(accuracies[0] - accuracies[1]) <= 2.5

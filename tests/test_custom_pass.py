"""The example plugin, installed into a fresh environment, passes its own tests there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "custom_pass"
PACKAGE = "fhe_fx_flat_softmax"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment that has the plugin, and sees what we have."""
    home = tmp_path_factory.mktemp("environment")
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    source = shutil.copytree(EXAMPLE, home / "source", ignore=ignored)
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv")
    python = home / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    # Installing PyTorch again would take minutes: the new one sees the packages of this one.
    (site / "parent.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    quick = ("-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *quick, source)
    assert (site / PACKAGE / "flat_softmax.py").is_file()
    return python


def run(*command: object) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests_pass_there(python: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", EXAMPLE)
    assert "5 passed" in run(python, "-W", "ignore", "-m", "pytest", *options, EXAMPLE / "tests")


def test_the_command_there_knows_it_and_here_does_not(python: Path) -> None:
    text = "default,flat-softmax{max_live=8}@before:lower-softmax"
    command = ("-W", "ignore", "-m", "fhe_fx")
    listed = json.loads(run(python, *command, "passes", text, "--json"))["passes"]
    names = [p["name"] for p in listed]
    assert names.index("flat-softmax") == names.index("lower-softmax") - 1
    model = "random:gpt2,n_layer=1,n_embd=16,n_head=2,vocab_size=50"
    part = ("--submodule", "h.0.attn", "--heads", "0", "--tokens", "3", "--p-error", "0.1")
    report = (*command, "report", model, *part, "--backend", "price-list", "--json", "--passes")
    found: dict[str, Any] = {p: json.loads(run(python, *report, p)) for p in ("default", text)}
    costs = {k: v["regions"][0]["look_ups"] for k, v in found.items()}
    # Rows of two and three keys: 2 n + 1 look-ups each in place of 2 n - 1.
    assert costs[text] == costs["default"] + 4
    assert found[text]["regions"][0]["complexity"] == pytest.approx(costs[text] * 9.7e7)
    doctor = json.loads(run(python, *command, "doctor", "--no-measure", "--json"))
    assert doctor["plugins"] == [
        "fhe-fx-flat-softmax 0.1.0: flat-softmax of fhe_fx.passes",
        "fhe-fx-flat-softmax 0.1.0: snake of fhe_fx.lowerings",
        "fhe-fx-flat-softmax 0.1.0: price-list of fhe_fx.backends",
    ]
    here = subprocess.run(
        [sys.executable, *command, "passes", text], capture_output=True, text=True, check=False
    )
    assert here.returncode == 2
    assert here.stderr.startswith("error: There is no pass 'flat-softmax'.")

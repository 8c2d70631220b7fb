"""Client and server, each from a wheel in a virtual environment with its own extra alone.

Not part of the default run, since it installs PyTorch twice:

    pytest -m installs tests/serving/test_installed.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fhe_fx
from tests.models import FEW, tiny_gpt2
from tests.serving.conftest import ROOT
from tests.serving.test_two_sides import decided

pytestmark = [pytest.mark.fhe, pytest.mark.installs]

FOREIGN = {"client": ["fastapi", "uvicorn", "prometheus_client"], "server": ["cryptography"]}
"""Packages that only the other party's extra brings."""

CLIENT = """
import json, sys
import torch, fhe_fx
model = fhe_fx.from_pretrained("client", remote=sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
print(json.dumps(model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0).tolist()))
print(fhe_fx.__file__)
"""


def run(*arguments: object, cwd: Path) -> str:
    """Run a command that knows nothing of this checkout, and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        [str(a) for a in arguments], capture_output=True, text=True, cwd=cwd, env=environment,
        check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


def installed(party: str, wheel: Path, folder: Path) -> Path:
    """Return the `bin` of a new environment with the wheel and the extra of one party."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    bin_ = folder / "venv" / "bin"
    run(bin_ / "python", "-m", "pip", "install", "-q", f"{wheel}[{party}]", cwd=folder)
    for package in FOREIGN[party]:
        check = f"import importlib.util as u; assert u.find_spec('{package}') is None"
        run(bin_ / "python", "-c", check, cwd=folder)
    return bin_


def test_each_party_works_with_its_own_extra_alone(wheel: Path, tmp_path: Path) -> None:
    sides = {party: tmp_path / party for party in ("client", "server")}
    for folder in sides.values():
        folder.mkdir()
    model = fhe_fx.encrypt_submodule(
        tiny_gpt2(n_embd=4, n_head=1, n_inner=4), "h.0.mlp", max_tokens=2, options=FEW
    )
    model.save_pretrained(tmp_path / "out", validate=False)
    prompt = decided(model, torch.arange(40).reshape(20, 2))
    for party, folder in sides.items():
        shutil.move(tmp_path / "out" / party, folder / party)
    shutil.rmtree(tmp_path / "out")
    bins = {party: installed(party, wheel, folder) for party, folder in sides.items()}
    serve = [bins["server"] / "fhe-fx", "serve", "server", "--port", "0"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with subprocess.Popen(
        [str(a) for a in serve], cwd=sides["server"], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            run(bins["client"] / "fhe-fx", "keygen", "client", cwd=sides["client"])
            python = [bins["client"] / "python", "-W", "ignore", "-c", CLIENT]
            printed = run(*python, url, json.dumps(prompt.tolist()), cwd=sides["client"])
        finally:
            server.send_signal(signal.SIGTERM)
    written, where = printed.splitlines()
    assert where.startswith(str(sides["client"] / "venv"))
    fhe_fx.set_mode(model, "clear")
    expected = model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert json.loads(written) == expected.tolist()

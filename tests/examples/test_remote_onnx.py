"""A process without PyTorch and without fhe_fx gets from a server what the integers give."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.serving.conftest import ROOT

pytestmark = [
    pytest.mark.fhe,
    pytest.mark.skipif(
        importlib.util.find_spec("fhe_fx.export.onnx") is None,
        reason="this fhe_fx writes no ONNX models",
    ),
]

MODEL = "random:gpt2,n_layer=1,n_embd=4,n_head=1,n_inner=4,vocab_size=50,n_positions=16,"
MODEL += "initializer_range=0.3"
CLIENT = """
import runpy, sys
sys.modules.update(torch=None, fhe_fx=None)  # importing either fails
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def fhe_fx(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "fhe_fx", *map(str, arguments)]


def decided(tmp_path: Path) -> tuple[list[int], int]:
    """Return the prompt, of twenty, whose next token wins by most, and that token.

    By the three ONNX models, the server's in the clear; noise cannot turn what wins by much.
    """
    import onnxruntime

    names = ("client/before", "server/region", "client/after")
    sessions = [onnxruntime.InferenceSession(tmp_path / "onnx" / f"{n}.onnx") for n in names]
    found = []
    for first in range(0, 40, 2):
        prompt = [first, first + 1]
        values = {"input_ids": np.array([prompt], np.int64)}
        for session in sessions:
            given = {i.name: values[i.name] for i in session.get_inputs()}
            outputs = [o.name for o in session.get_outputs()]
            values |= dict(zip(outputs, session.run(outputs, given), strict=True))
        logits = values[outputs[0]][0, -1]
        best = np.sort(logits)
        found.append((float(best[-1] - best[-2]), prompt, int(logits.argmax())))
    return max(found)[1:]


def test_a_client_without_pytorch_writes_on(tmp_path: Path) -> None:
    part = ["--submodule", "h.0.mlp", "--tokens", 2, "--n-bits", 4, "--circuit-only"]
    out = ["--out", tmp_path / "out", "--onnx", tmp_path / "onnx"]
    subprocess.run(fhe_fx("export", MODEL, *part, *out), cwd=ROOT, check=True)
    prompt, token = decided(tmp_path)
    with subprocess.Popen(
        fhe_fx("serve", tmp_path / "out/server", "--port", 0),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            arguments = [
                "--circuit", tmp_path / "out/client", "--models", tmp_path / "onnx/client",
                "--server", server.stdout.readline().strip(), "--keys", tmp_path / "keys",
                "--prompt", " ".join(map(str, prompt)),
            ]  # fmt: skip
            code = CLIENT.format(script=str(ROOT / "examples/remote_onnx/remote_client.py"))
            command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
            found = subprocess.run(
                command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
            )
        finally:
            server.send_signal(signal.SIGTERM)
    assert int(found.stdout) == token
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600

"""Writes a token with a server and a client that has no weights, and the same token here.

    python benchmarks/remote.py                                  # the shipped GPT-2, h.0.attn whole
    python benchmarks/remote.py --heads 0 --n-bits 2 --tokens 3  # a small part of it

The model is saved for two parties. A server process gets `server`, a client process `client` and
its keys; each runs in a directory of its own. The prompt is as long as the circuit, and is run once
remotely and once by local execution with other keys. What is sent is counted by the server.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fhe_fx
from fhe_fx.report.machine import machine_name
from fhe_fx.serving.keys import keygen

SHIPPED = Path(__file__).parent.parent / "examples/gpt2/model"
CLIENT = """
import json, sys, time
import torch, fhe_fx
model = fhe_fx.from_pretrained("client", remote=sys.argv[1], timeout=36000)
ids, start = torch.tensor(json.loads(sys.argv[2])), time.perf_counter()
written = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
print(json.dumps([written[0, -1].item(), time.perf_counter() - start]))
"""


def main() -> None:
    """Print one JSON object; exit with 1 if the two tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(SHIPPED))
    parser.add_argument("--submodule", default="h.0.attn")
    parser.add_argument("--heads", type=int, nargs="*")
    parser.add_argument("--n-bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--prompt", default="He had never seen a house so full of people")
    choices = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(choices.model)
    prompt = tokenizer(choices.prompt, return_tensors="pt")["input_ids"][:, : choices.tokens]
    calibration = (Path(choices.model) / "calibration.txt").read_text().splitlines()
    model = fhe_fx.encrypt_submodule(
        AutoModelForCausalLM.from_pretrained(choices.model).eval(),
        choices.submodule,
        n_bits=choices.n_bits,
        heads=choices.heads,
        max_tokens=choices.tokens,
        calibration=[tokenizer(line, return_tensors="pt") for line in calibration],
    )
    with tempfile.TemporaryDirectory() as name:
        found = _measure(model, tokenizer, prompt, Path(name))
    print(json.dumps(found, indent=1))
    raise SystemExit(found["remote_token"] != found["local_token"])


def _measure(model: Any, tokenizer: Any, prompt: torch.Tensor, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder / "out", tokenizer=tokenizer, validate=False)
    for party in ("client", "server"):
        shutil.copytree(folder / "out" / party, folder / party / party)
    start = time.perf_counter()
    keys = keygen(folder / "client" / "client")
    keygen_seconds = time.perf_counter() - start
    token, seconds, sent = _remotely(folder, prompt)
    cost = fhe_fx.report(model).regions[0]
    fhe_fx.set_mode(model, "execute")
    start = time.perf_counter()
    local = model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
    local_seconds = time.perf_counter() - start
    fhe_fx.set_mode(model, "disable")
    return {
        "machine": machine_name(),
        "part": cost.name, "tokens": prompt.shape[1], "look_ups": cost.look_ups,
        "complexity": cost.complexity, "bits_of_a_look_up": cost.max_lookup_bits,
        "client_bytes": _size(folder / "client" / "client"),
        "server_bytes": _size(folder / "server" / "server"),
        "evaluation_key_bytes": keys.evaluation.stat().st_size,
        "keygen_seconds": round(keygen_seconds, 1),
        "input_bytes": sent["input"], "result_bytes": sent["result"],
        "remote_token": tokenizer.decode([token]),
        "local_token": tokenizer.decode([int(local[0, -1])]),
        "float_token": tokenizer.decode([int(model(prompt).logits[0, -1].argmax())]),
        "remote_seconds": round(seconds, 1),
        "local_seconds_with_keygen": round(local_seconds, 1),
    }  # fmt: skip


def _remotely(folder: Path, prompt: torch.Tensor) -> tuple[int, float, dict[str, int]]:
    """Return the token, the seconds, and the bytes of the input and the result."""
    python = [sys.executable, "-W", "ignore"]
    serve = [*python, "-m", "fhe_fx", "serve", "server", "--port", "0", "--timeout", "36000"]
    log = folder / "log"
    with log.open("w") as errors, subprocess.Popen(
        serve, cwd=folder / "server", stdout=subprocess.PIPE, stderr=errors, text=True
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            client = subprocess.run(
                [*python, "-c", CLIENT, url, json.dumps(prompt.tolist())],
                cwd=folder / "client", stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
        finally:
            server.send_signal(signal.SIGTERM)
    token, seconds = json.loads(client.stdout)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    asked = [e for e in events if e["event"] == "request" and e["method"] == "PUT"]
    given = [e for e in events if str(e.get("route", "")).endswith("/result")]
    sent = {"input": int(asked[0]["bytes"]), "result": int(given[0]["sent"])}
    return token, seconds, sent


def _size(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


if __name__ == "__main__":
    main()

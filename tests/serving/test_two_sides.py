"""The whole path: a server with the circuit, and client processes that never had the weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import fhe_fx
from fhe_fx.cli import app
from fhe_fx.errors import ArtifactError
from fhe_fx.export import save
from fhe_fx.serving.keys import StoredKeys, key_id, keygen, make_keys
from tests.models import FEW, SHIPPED, shipped_gpt2, shipped_sentences, tiny_gpt2
from tests.serving.conftest import ROOT, Server, Start

pytestmark = pytest.mark.fhe

CLIENT = """
import json, sys
import torch, fhe_fx
url, keys, token, prompt = sys.argv[1:]
torch.set_num_threads(1)
model = fhe_fx.from_pretrained("client", remote=url, keys=keys, token=token)
assert not [name for name in model.state_dict() if name.startswith("transformer.h.0.attn.")]
ids = torch.tensor(json.loads(prompt))
written = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
print(json.dumps(written.tolist()))
"""


@dataclass
class Language:
    """The shipped GPT-2 with one head of its first attention encrypted, at the exporter's."""

    model: Any
    directory: Path
    prompt: Tensor


def decided(model: Any, prompts: Tensor, n_draws: int = 12) -> Tensor:
    """Return the prompt whose next token leads by most, so that noise cannot turn it.

    The lead over every other token must be eight times the deviation that the noise of encryption,
    simulated, gives it.
    """
    fhe_fx.set_mode(model, "clear")
    with torch.no_grad():
        best = model(prompts).logits[:, -1].topk(2).values
        leads = best[:, 0] - best[:, 1]
        prompt, lead = prompts[leads.argmax()][None], leads.max()
        winner = model(prompt).logits[0, -1].argmax()
        fhe_fx.set_mode(model, "simulate")
        drawn = torch.stack([_lead(model(prompt).logits[0, -1], winner) for _ in range(n_draws)])
    assert lead > 8 * (drawn - lead).square().mean().sqrt(), (lead, drawn)
    return prompt


def _lead(logits: Tensor, winner: Tensor) -> Tensor:
    others = logits.index_fill(0, winner, -torch.inf)
    return logits[winner] - others.max()


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Language:
    from transformers import AutoTokenizer

    calibration = [s[:, :2] for s in shipped_sentences()[64:96]]
    model = fhe_fx.encrypt_submodule(
        shipped_gpt2(), "h.0.attn", n_bits=3, max_tokens=2, heads=[0], calibration=calibration
    )
    directory = tmp_path_factory.mktemp("language") / "out"
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model.save_pretrained(directory, tokenizer=tokenizer, validate=False)
    prompts = torch.cat([s[:, :2] for s in shipped_sentences()[:64]])
    return Language(model, directory, decided(model, prompts))


@pytest.fixture(scope="module")
def language_server(language: Language, start: Start) -> Server:
    return start("--timeout", 300, directory=language.directory / "server")


@pytest.fixture(scope="module")
def alone(language: Language, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory in which a client has its own side and nothing else."""
    directory = tmp_path_factory.mktemp("alone")
    shutil.copytree(language.directory / "client", directory / "client")
    return directory


@pytest.fixture(scope="module")
def tenants(alone: Path) -> dict[str, StoredKeys]:
    return {who: keygen(alone / "client", alone / f"{who}.keys") for who in ("alice", "bob")}


def test_two_clients_without_weights_write_what_local_execution_writes(
    language: Language, language_server: Server, alone: Path, tenants: dict[str, StoredKeys]
) -> None:
    """Two tenants at once, each a process of its own."""
    prompt = json.dumps(language.prompt.tolist())
    processes = []
    for who in tenants:
        arguments = [language_server.url, f"{who}.keys", language_server.tokens[who], prompt]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", CLIENT, *arguments],
                stdout=subprocess.PIPE, text=True, cwd=alone,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        )  # fmt: skip
    written = [json.loads(p.communicate(timeout=300)[0]) for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    fhe_fx.set_mode(language.model, "execute")
    asked = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    local = language.model.generate(language.prompt, **asked).tolist()
    assert written == [local, local]
    events = [json.loads(line) for line in language_server.log.read_text().splitlines()]
    assert {e["tenant"] for e in events if e["event"] == "run"} == {"alice", "bob"}


def test_the_command_writes_on(
    language: Language, language_server: Server, alone: Path, tenants: dict[str, StoredKeys],
    tmp_path: Path,
) -> None:  # fmt: skip
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(alone / "client")
    token = tmp_path / "token"
    token.write_text(language_server.tokens["alice"])
    given = [
        "run", alone / "client", "--mode", "remote", "--server", language_server.url,
        "--token-file", token, "--keys", alone / "alice.keys",
    ]  # fmt: skip
    text = tokenizer.decode(language.prompt[0])
    assert torch.equal(tokenizer(text, return_tensors="pt")["input_ids"], language.prompt)
    result = CliRunner().invoke(app, [str(a) for a in [*given, "--prompt", text]])
    assert result.exit_code == 0, result.stderr
    fhe_fx.set_mode(language.model, "clear")
    expected = language.model(language.prompt).logits[0, -1].argmax()
    assert result.stdout == f"{tokenizer.decode([int(expected)])}\n"
    assert language_server.stop() == 0  # nothing needs it any more
    result = CliRunner().invoke(app, [str(a) for a in [*given, "--prompt", "a", "--input", "b"]])
    assert "Give --input X.npy; or, with --mode remote, --prompt TEXT." in result.stderr


def test_parts_and_lengths_run_through_one_connection(tmp_path: Path, start: Start) -> None:
    """Each on its own circuit, all with one set of keys, from one directory."""
    gpt2 = tiny_gpt2(n_embd=4, n_head=1, n_inner=4)
    model = fhe_fx.encrypt_submodule(gpt2, "h.*.mlp", n_bits=4, max_tokens=(1, 2), options=FEW)
    save(model, tmp_path / "out", validate=False)
    shutil.copytree(tmp_path / "out" / "client", tmp_path / "alone" / "client")
    (made,) = make_keys(tmp_path / "alone" / "client")
    assert len(list((tmp_path / "alone" / "client.keys").iterdir())) == 1
    with pytest.raises(ArtifactError, match=r"secret\.keys exists; keys are never overwritten"):
        make_keys(tmp_path / "alone" / "client")
    made.secret.unlink()  # as if it had been interrupted there
    (again,) = make_keys(tmp_path / "alone" / "client")
    assert again.id == key_id(again.evaluation) != made.id
    server = start(directory=tmp_path / "out" / "server")
    loaded: Any = fhe_fx.from_pretrained(
        tmp_path / "alone", remote=server.url, token=server.tokens["alice"]
    )
    fhe_fx.set_mode(model, "clear")
    for prompt in (torch.tensor([[5]]), torch.tensor([[5, 6]])):
        expected = model(prompt).logits
        assert (loaded(prompt).logits - expected).norm() < 0.5 * expected.norm()  # noise
    used = server.store / "keys" / "alice"
    assert [path.name for path in used.iterdir()] == [again.id]
    events = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert sum(e["event"] == "run" and e["state"] == "done" for e in events) == 2 * 2

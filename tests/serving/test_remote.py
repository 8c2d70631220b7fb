"""The whole path: real server and client processes, real encryption, a model that generates."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.errors import ArtifactError, OptionsError, RemoteError, TargetError
from fhe_fx.export import export_region
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.region import Region
from fhe_fx.serving import client as client_module
from fhe_fx.serving.keys import StoredKeys, keygen
from tests.export.conftest import make_inputs, make_net, make_region
from tests.models import FEW, tiny_gpt2
from tests.serving.conftest import ROOT, Server, Start, halted

pytestmark = pytest.mark.fhe

CLIENT = """
import json, sys, torch
import fhe_fx
url, client, keys, token = sys.argv[1:]
torch.set_num_threads(1)
connection = fhe_fx.connect(url, client=client, keys=keys, token=token)
inputs = torch.tensor(json.loads(sys.stdin.read()))
print(json.dumps([connection.run([x])[0].tolist() for x in inputs]))
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PATIENCE", 1.0)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _client(
    server: Server, who: str, exported: Path, keys: StoredKeys, samples: list[torch.Tensor]
) -> subprocess.Popen[str]:
    """Start a client process that runs the samples one after the other."""
    arguments = [server.url, exported / "client", keys.secret.parent, server.tokens[who]]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CLIENT, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps([s.tolist() for s in samples]))
    process.stdin.close()
    return process


def _answers(process: subprocess.Popen[str]) -> torch.Tensor:
    assert process.stdout is not None
    results = torch.tensor(json.loads(process.stdout.read()))
    process.stdout.close()
    assert process.wait(60) == 0
    return results


def test_two_tenants_at_once(
    server: Server, exported: Path, served_region: Region, alice: StoredKeys, bob: StoredKeys
) -> None:
    """Two client processes, which know no weights, get what the integers give, up to noise."""
    samples = [served_region.captured.samples[k][0] for k in (0, 5, 9)]
    processes = []
    for who, keys in (("alice", alice), ("bob", bob)):
        processes.append(_client(server, who, exported, keys, samples))
    for process in processes:
        results = _answers(process)
        for sample, result in zip(samples, results, strict=True):
            clear = served_region.run_circuit([sample], "clear")[0]
            assert distance(result, clear) < 0.5  # noise, as of local execution
    seen = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {e["tenant"] for e in seen if e["event"] == "run"} == {"alice", "bob"}


def test_a_model_runs_its_part_remotely(
    server: Server, exported: Path, alice: StoredKeys, bob: StoredKeys
) -> None:
    model = fhe_fx.encrypt_submodule(make_net(), "body", n_bits=4, calibration=make_inputs())
    stages: list[str] = []
    connection = fhe_fx.connect(
        server.url, client=exported / "client", token=server.tokens["alice"], model=model,
        on_stage=stages.append,
    )  # fmt: skip
    batch = torch.cat(make_inputs()[3:5])
    fhe_fx.set_mode(model, "clear")
    clear = model(batch)
    fhe_fx.set_mode(model, "remote")
    assert distance(model(batch), clear) < 0.5
    assert any(s.startswith("body: ") for s in stages)
    with pytest.raises(TargetError, match=r"The bundle is of 'body'; the encrypted parts of Net"):
        connection.attach(make_net())
    other = fhe_fx.encrypt_submodule(make_net(), "body", n_bits=4, calibration=make_inputs(12))
    with pytest.raises(RemoteError, match="encodes its inputs or results otherwise"):
        connection.attach(other)
    connection.close()


def _decided(model: torch.nn.Module) -> torch.Tensor:
    """Return the prompt, of twenty, whose next token wins by most, so that noise cannot turn it."""
    fhe_fx.set_mode(model, "clear")
    prompts = torch.arange(40).reshape(20, 2)
    best = model(prompts).logits[:, -1].topk(2).values
    return prompts[(best[:, 0] - best[:, 1]).argmax()][None]


def test_generate_works_through_it(tmp_path: Path) -> None:
    """A token of a GPT-2 whose first activation runs on the server, as in the clear."""
    gpt2 = tiny_gpt2(n_embd=4, n_head=1, n_inner=4)
    model = fhe_fx.encrypt_submodule(gpt2, "h.0.mlp", n_bits=4, max_tokens=2, options=FEW)
    export_region(encrypted_modules(model)[0].region, tmp_path / "out", validate=False)
    keygen(tmp_path / "out" / "client", passphrase="correct horse")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "fhe_fx", "serve", str(tmp_path / "out/server"),
         "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            with pytest.raises(ArtifactError, match="under a passphrase, and none was given"):
                fhe_fx.connect(url, client=tmp_path / "out/client")
            prompt, written = _decided(model), {}
            with fhe_fx.connect(
                url, client=tmp_path / "out/client", model=model, passphrase="correct horse"
            ):
                for mode in ("clear", "remote"):
                    fhe_fx.set_mode(model, mode)
                    written[mode] = model.generate(prompt, max_new_tokens=1, do_sample=False)
            assert torch.equal(written["remote"], written["clear"])
        finally:
            process.send_signal(signal.SIGTERM)


def test_a_client_outlives_the_server_that_it_asked(
    start: Start, exported: Path, served_region: Region, alice: StoredKeys
) -> None:
    """Kill -9 in mid-run; another server of the same store and port gives the result."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first = start("--port", port)
    connection = fhe_fx.connect(
        first.url, client=exported / "client", token=first.tokens["alice"]
    )  # fmt: skip
    (worker,) = first.workers()
    os.kill(worker, signal.SIGSTOP)
    sample, found = served_region.captured.samples[2], []
    thread = threading.Thread(target=lambda: found.extend(connection.run(sample)))
    thread.start()
    with first.http() as http:
        while "fhe_fx_runs_active 1.0" not in http.get("/metrics").text:
            pass
    first.stop(signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it is gone, or goes when it can read again
        os.kill(worker, signal.SIGCONT)
    start("--port", port, store=first.store)
    thread.join(60)
    connection.close()
    assert distance(found[0], served_region.run_circuit(sample, "clear")[0]) < 0.5


def test_a_client_that_is_killed_can_ask_again(
    start: Start, exported: Path, served_region: Region, alice: StoredKeys
) -> None:
    """Kill -9 while its run is in work: what is stored is whole, and serves the next."""
    server = start()
    samples = [served_region.captured.samples[4][0]]
    with server.http() as http, halted(server):
        first = _client(server, "alice", exported, alice, samples)
        while "fhe_fx_runs_active 1.0" not in http.get("/metrics").text:
            assert first.poll() is None
        first.kill()
        first.wait(60)
        assert first.stdout is not None
        first.stdout.close()
    (result,) = _answers(_client(server, "alice", exported, alice, samples))
    clear = served_region.run_circuit(samples, "clear")[0]
    assert distance(result, clear) < 0.5  # noise, as of local execution
    assert [p.name for p in (server.store / "keys" / "alice").iterdir()] == [alice.id]


def test_another_export_is_one_clear_error(server: Server, tmp_path: Path) -> None:
    export_region(make_region(n_bits=3), tmp_path / "out", validate=False)
    with pytest.raises(RemoteError) as caught:
        fhe_fx.connect(server.url, client=tmp_path / "out/client", token=server.tokens["alice"])
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/out/client is body of export ")
    assert f"which {server.url} does not serve. It serves: body (export " in text
    assert text.endswith("need the two directories of one `fhe-fx export`.")


def test_a_wrong_token_and_a_missing_server(
    server: Server, exported: Path, impatient: None
) -> None:
    with pytest.raises(RemoteError, match=r"refuses: Give a token: .* \(status 401\)"):
        fhe_fx.connect(server.url, client=exported / "client", token="wrong")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RemoteError, match=r"cannot be reached \(ConnectError: .*tried again"):
        fhe_fx.connect(f"http://127.0.0.1:{port}", client=exported / "client")
    with pytest.raises(RemoteError, match="'localhost:80' is not the URL of a server"):
        fhe_fx.connect("localhost:80", client=exported / "client")


class Scripted:
    """A transport that answers from a list: a server that misbehaves."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers, self.asked = list(answers), 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


def scripted(*answers: httpx.Response | Exception) -> tuple[client_module._Http, Scripted]:
    script = Scripted(*answers)
    http = client_module._Http("http://server", None, lambda stage: None)
    http.close()
    http._client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(script))
    return http, script


def test_busy_and_broken_connections_are_tried_again() -> None:
    http, script = scripted(
        httpx.ConnectError("refused"), httpx.Response(503), httpx.ReadTimeout("slow"),
        httpx.Response(200, json={"ok": 1}),
    )  # fmt: skip
    assert http.json("GET", "/x") == {"ok": 1}
    assert script.asked == 4


def test_refusals_are_not_tried_again() -> None:
    http, script = scripted(httpx.Response(413, json={"error": {"message": "Too large."}}))
    with pytest.raises(RemoteError, match=r"^http://server refuses: Too large\. \(status 413\)$"):
        http.json("PUT", "/x")
    assert script.asked == 1


def test_answers_that_are_too_long_or_no_json_are_refused(impatient: None) -> None:
    http, _ = scripted(httpx.Response(200, content=bytes(2 << 20)))
    with pytest.raises(RemoteError, match="sends more than the 1048576 bytes expected"):
        http.json("GET", "/x")
    http, _ = scripted(httpx.Response(200, content=b"[" * 100_000))
    with pytest.raises(RemoteError, match="status 200"):
        http.json("GET", "/x")


def test_a_run_that_is_late_is_cancelled(server: Server, exported: Path, alice: StoredKeys) -> None:
    connection = fhe_fx.connect(
        server.url, client=exported / "client", token=server.tokens["alice"], timeout=1.5
    )
    late = r"no result within 1\.5 s; the run is cancelled"
    with halted(server), pytest.raises(RemoteError, match=late):
        connection.circuits[0].execute([np.zeros((1, 6), np.int64)])
    connection.close()
    with server.http() as http:
        assert "fhe_fx_runs_active 0.0" in http.get("/metrics").text


def test_a_bundle_serves_the_length_that_it_was_made_of() -> None:
    """Of a ladder, only the circuit whose encodings are the bundle's runs on the server."""
    model = fhe_fx.encrypt_submodule(
        tiny_gpt2(), "h.0.attn", heads=[0], max_tokens=(2, 4), options=FEW
    )
    two, four = (part.region for part in encrypted_modules(model))
    http, _ = scripted(httpx.Response(500))
    bundle = SimpleNamespace(name=two.program.name, codec=Codec.of(two.program))
    client_module.Connection(http, [bundle]).attach(model)  # type: ignore[list-item]
    assert (two.remote, four.remote) == (bundle, None)
    with pytest.raises(OptionsError, match="has no server"):
        fhe_fx.set_mode(model, "remote")
    other = SimpleNamespace(name=two.program.name, codec=Codec.of(make_region().program))
    with pytest.raises(RemoteError, match="the model encodes its inputs or results otherwise"):
        client_module.Connection(http, [other]).attach(model)  # type: ignore[list-item]

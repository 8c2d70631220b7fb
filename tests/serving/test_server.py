"""A real server process: what it refuses, survives and keeps, and what each tenant sees."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from fhe_fx.errors import OptionsError
from fhe_fx.export import ClientBundle, load_client_bundle
from fhe_fx.serving.app import Settings, create_app
from fhe_fx.serving.engine import LocalPool
from fhe_fx.serving.keys import StoredKeys
from fhe_fx.serving.server import ServeOptions, serve
from fhe_fx.serving.store import DirectoryKeyStore
from fhe_fx.serving.tokens import Tokens
from fhe_fx.serving.wire import ResultEncoding, pack_inputs, unpack_results
from tests.serving.conftest import Server, Start, error_of, halted

pytestmark = pytest.mark.fhe


@pytest.fixture(scope="module")
def bundle(exported: Path) -> ClientBundle:
    return load_client_bundle(exported / "client")


@pytest.fixture(scope="module")
def body(bundle: ClientBundle, alice: StoredKeys) -> bytes:
    """Return encrypted inputs of alice."""
    from fhe_fx.backends.concrete.parties import ConcreteClient

    client = ConcreteClient(bundle.specs)
    client.load(alice.read_secret(bundle.manifest["keyset"], None))
    return pack_inputs(client.encrypt([np.full((1, 6), 20)]))


def upload(http: httpx.Client, keys: StoredKeys, content: bytes | None = None) -> httpx.Response:
    content = keys.evaluation.read_bytes() if content is None else content
    query = {"offset": 0, "size": len(content)}
    return http.patch(f"/v1/keys/{keys.id}", params=query, content=content)


class Asked:
    """A run that was asked for."""

    def __init__(
        self, http: httpx.Client, bundle: ClientBundle, key: str, body: bytes, run: str = ""
    ) -> None:
        self.http, self.id = http, run or uuid.uuid4().hex
        self.where = f"/v1/runs/{self.id}"
        query = {"circuit": bundle.manifest["bundle"], "key": key}
        self.answer = http.put(self.where, params=query, content=body)

    def state(self, wait: float = 20) -> dict[str, Any]:
        answer = self.http.get(self.where, params={"wait": wait})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def check_done(self, bundle: ClientBundle) -> None:
        assert self.state()["state"] == "done", self.state()
        result = self.http.get(f"{self.where}/result")
        assert unpack_results(result.content, ResultEncoding.of(bundle.manifest))


def is_alive(process: int) -> bool:
    """Say whether a process is more than an entry that nobody has collected."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


# Entering -------------------------------------------------------------------------------------


def test_only_health_is_open(server: Server) -> None:
    with httpx.Client(base_url=server.url) as nobody:
        assert nobody.get("/health").json() == {"status": "ok"}
        for method, path in (
            ("GET", "/metrics"),
            ("GET", "/v1/circuits"),
            ("GET", f"/v1/keys/{'0' * 64}"),
            ("DELETE", f"/v1/runs/{'0' * 32}"),
        ):
            for value in ("", "Bearer", "Bearer wrong", f"Basic {server.tokens['alice']}"):
                answer = nobody.request(method, path, headers={"Authorization": value})
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_the_interface_is_described(server: Server) -> None:
    with server.http() as http:
        described = http.get("/openapi.json").json()
        assert set(described["paths"]) == {
            "/health", "/metrics", "/v1/circuits", "/v1/keys/{key}", "/v1/runs/{run}",
            "/v1/runs/{run}/result",
        }  # fmt: skip
        assert http.get("/docs").status_code == 404  # it would load scripts from elsewhere


def test_sizes_are_refused_before_bytes_are_sent(server: Server, bundle: ClientBundle) -> None:
    """Only headers are sent; the answer comes all the same."""
    host, port = server.url.removeprefix("http://").split(":")

    def answer(path: str, *headers: str) -> str:
        lines = [
            f"{path} HTTP/1.1", f"Host: {host}", *headers,
            f"Authorization: Bearer {server.tokens['alice']}", "", "",
        ]  # fmt: skip
        with socket.create_connection((host, int(port)), 10) as sender:
            sender.sendall("\r\n".join(lines).encode())
            return sender.recv(4096).decode()

    query = f"circuit={bundle.manifest['bundle']}&key={'0' * 64}"
    put, patch = f"PUT /v1/runs/{'0' * 32}?{query}", f"PATCH /v1/keys/{'0' * 64}"
    assert " 413 " in answer(put, "Content-Length: 99999999")
    assert " 411 " in answer(put, "Transfer-Encoding: chunked")
    assert " 413 " in answer(f"{patch}?offset=0&size=100", "Content-Length: 101")
    assert " 413 " in answer(f"{patch}?offset=0&size={10**12}", "Content-Length: 5")
    assert " 422 " in answer(f"{patch}?offset=-1&size=5", "Content-Length: 5")
    assert " 422 " in answer("PATCH /v1/keys/..evil?offset=0&size=5", "Content-Length: 5")
    assert " 404 " in answer("PATCH /v1/keys/..%2fevil?offset=0&size=5", "Content-Length: 5")


# Keys -----------------------------------------------------------------------------------------


def test_an_upload_goes_on_where_it_was_cut_off(server: Server, alice: StoredKeys) -> None:
    content, where = alice.evaluation.read_bytes(), f"/v1/keys/{alice.id}"
    half, size = len(content) // 2, len(content)

    def send(offset: int, end: int) -> httpx.Response:
        query = {"offset": offset, "size": size}
        return http.patch(where, params=query, content=content[offset:end])

    with server.http() as http:
        assert http.get(where).json()["received"] == 0
        assert send(0, half).json() == {"key": alice.id, "received": half, "is_complete": False}
        refusal = send(0, half)
        assert refusal.status_code == 409
        assert error_of(refusal) == f"{half} bytes are here; go on from there, up to {size}."
        assert send(half, size).json()["is_complete"]
        assert send(0, half).json()["is_complete"]  # again is as good as once


def test_other_bytes_are_not_kept(server: Server, alice: StoredKeys, bob: StoredKeys) -> None:
    with server.http("carol") as http:
        refusal = upload(http, bob, alice.evaluation.read_bytes())
        assert refusal.status_code == 400
        assert "have another sha256 than their key id" in error_of(refusal)
        assert http.get(f"/v1/keys/{bob.id}").json()["received"] == 0


def test_keys_are_deleted(server: Server, bob: StoredKeys) -> None:
    with server.http("carol") as http:
        assert upload(http, bob).json()["is_complete"]
        assert http.delete(f"/v1/keys/{bob.id}").status_code == 204
        assert http.get(f"/v1/keys/{bob.id}").json()["received"] == 0


def test_a_full_disk_is_said(tmp_path: Path, bundle: ClientBundle, exported: Path) -> None:
    class Full(DirectoryKeyStore):
        def append(self, tenant: str, key: str, chunk: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    app = create_app(
        Settings(
            {bundle.manifest["bundle"]: bundle.manifest},
            LocalPool({}, 0, 0, 0),
            Full(tmp_path / "keys"),
            tmp_path / "runs",
            Tokens(None),
        )
    )
    with TestClient(app) as http:
        answer = http.patch(f"/v1/keys/{'0' * 64}?offset=0&size=3", content=b"abc")
    assert answer.status_code == 507
    assert answer.json()["error"]["message"] == "The server's disk is full; nothing was kept."


# Runs -----------------------------------------------------------------------------------------


def test_asking_twice_runs_once(
    server: Server, bundle: ClientBundle, alice: StoredKeys, body: bytes
) -> None:
    with server.http() as http:
        upload(http, alice)
        first = Asked(http, bundle, alice.id, body)
        assert first.answer.status_code == 202
        again = Asked(http, bundle, alice.id, body, first.id)
        assert again.answer.status_code == 202
        first.check_done(bundle)
        after = Asked(http, bundle, alice.id, body, first.id)
        assert after.answer.json()["state"] == "done"
        assert after.answer.json()["seconds"] == first.state()["seconds"]
        other = Asked(http, bundle, alice.id, body[:-1] + b"x", first.id)
        assert other.answer.status_code == 409
        assert error_of(other.answer) == "This run id is taken by another request."


def test_a_tenant_reaches_nothing_of_another(
    server: Server, bundle: ClientBundle, alice: StoredKeys, body: bytes
) -> None:
    with server.http() as http, server.http("bob") as other:
        upload(http, alice)
        run = Asked(http, bundle, alice.id, body)
        assert other.get(f"/v1/keys/{alice.id}").json()["received"] == 0
        assert other.delete(f"/v1/keys/{alice.id}").status_code == 204  # of bob's, who has none
        foreign = Asked(other, bundle, alice.id, body)
        assert foreign.answer.status_code == 409
        assert "not here; upload them first" in error_of(foreign.answer)
        for method, path in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
            assert other.request(method, run.where + path).status_code == 404
        run.check_done(bundle)
        assert http.get(f"/v1/keys/{alice.id}").json()["is_complete"]


def test_malformed_inputs_fail_alone(
    server: Server, bundle: ClientBundle, alice: StoredKeys, body: bytes
) -> None:
    rng = np.random.default_rng(0)
    flipped = bytearray(body)
    for at in rng.integers(40, 140, 6):  # in the structure of the message, not in its numbers
        flipped[at] ^= int(rng.integers(1, 256))
    bodies = [b"", b"garbage", body[:-9], body + b"\0", rng.bytes(len(body)), bytes(flipped)]
    bodies += [pack_inputs([rng.bytes(400)]), pack_inputs([b""])]
    with server.http() as http:
        upload(http, alice)
        for bad in bodies:
            found = Asked(http, bundle, alice.id, bad).state()
            assert found["state"] == "failed", (bad[:20], found)
            assert found["message"]
        Asked(http, bundle, alice.id, body).check_done(bundle)


def test_malformed_keys_fail_alone(
    server: Server, bundle: ClientBundle, alice: StoredKeys, body: bytes
) -> None:
    import dataclasses
    import hashlib

    content = alice.evaluation.read_bytes()[:100_000]
    cut = dataclasses.replace(alice, id=hashlib.sha256(content).hexdigest())
    with server.http() as http:
        upload(http, alice)
        assert upload(http, cut, content).json()["is_complete"]  # it is what it says it is
        assert Asked(http, bundle, cut.id, body).state()["state"] == "failed"
        Asked(http, bundle, alice.id, body).check_done(bundle)
        http.delete(f"/v1/keys/{cut.id}")


def test_a_worker_that_dies_takes_one_run_with_it(
    server: Server, bundle: ClientBundle, alice: StoredKeys, body: bytes
) -> None:
    with server.http() as http:
        upload(http, alice)
        Asked(http, bundle, alice.id, body).check_done(bundle)  # so that there is a worker
        with halted(server) as worker:
            struck, next_one = (Asked(http, bundle, alice.id, body) for _ in range(2))
            while struck.state(0)["state"] != "running":
                time.sleep(0.05)
            os.kill(worker, signal.SIGKILL)
            found = struck.state()
        assert (found["state"], found["kind"]) == ("failed", "crashed")
        next_one.check_done(bundle)


def test_a_run_is_cancelled(
    server: Server, bundle: ClientBundle, alice: StoredKeys, body: bytes
) -> None:
    with server.http() as http:
        upload(http, alice)
        Asked(http, bundle, alice.id, body).check_done(bundle)
        with halted(server):
            running, waiting = (Asked(http, bundle, alice.id, body) for _ in range(2))
            assert waiting.state(0)["state"] == "queued"
            for run in (waiting, running):
                assert http.delete(run.where).status_code == 204
                assert http.get(run.where).status_code == 404
        Asked(http, bundle, alice.id, body).check_done(bundle)


def test_the_queue_is_bounded_and_shared(
    server: Server, bundle: ClientBundle, alice: StoredKeys, bob: StoredKeys, body: bytes
) -> None:
    """Of four places a tenant gets two."""
    with server.http() as http, server.http("bob") as other, server.http("carol") as third:
        for who, keys in ((http, alice), (other, bob), (third, bob)):
            upload(who, keys)
        Asked(http, bundle, alice.id, body).check_done(bundle)
        with halted(server):
            runs = [Asked(http, bundle, alice.id, body) for _ in range(2)]
            refusal = Asked(http, bundle, alice.id, body).answer
            assert refusal.status_code == 429
            assert error_of(refusal) == "2 of your runs are in the queue, which is your share."
            assert int(refusal.headers["Retry-After"]) > 0
            others = [Asked(other, bundle, bob.id, body) for _ in range(2)]
            refusal = Asked(third, bundle, bob.id, body).answer
            assert refusal.status_code == 503
            assert error_of(refusal) == "4 runs are in the queue, which is full."
            # One that is known is answered all the same.
            assert Asked(http, bundle, alice.id, body, runs[0].id).answer.status_code == 202
        for run in (*runs, *others):
            assert run.state()["state"] == "done"


def test_what_is_counted_and_logged(server: Server, body: bytes) -> None:
    with server.http() as http:
        counted = http.get("/metrics").text
    assert 'fhe_fx_runs_total{kind="",state="done"}' in counted
    assert "alice" not in counted
    events = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {"started", "request", "run"} <= {e["event"] for e in events}
    assert not [e for e in events if e["event"] == "fault" or e.get("status") == 500]
    allowed = {
        "time", "event", "circuits", "method", "route", "status", "bytes", "seconds", "run",
        "tenant", "state", "kind", "errno", "sent",
    }  # fmt: skip
    assert all(set(e) <= allowed for e in events)
    assert not any(token in server.log.read_text() for token in server.tokens.values())


# Limits, restarts, the end --------------------------------------------------------------------


def test_memory_is_bounded(
    start: Start, bundle: ClientBundle, alice: StoredKeys, body: bytes
) -> None:
    server = start("--worker-memory", 0.2)
    with server.http() as http:
        upload(http, alice)
        found = Asked(http, bundle, alice.id, body).state()
        assert found["state"] == "failed", found  # 160 MB of keys and what works on them
        assert found["kind"] in {"crashed", "out_of_memory", "failed"}
        assert http.get("/health").status_code == 200


def test_time_is_bounded(
    start: Start, bundle: ClientBundle, alice: StoredKeys, body: bytes
) -> None:
    server = start("--timeout", 6)
    with server.http() as http:
        upload(http, alice)
        with halted(server):
            found = Asked(http, bundle, alice.id, body).state()
        assert (found["kind"], found["message"]) == (
            "timeout",
            "The run took longer than the 6 s allowed.",
        )
        assert http.get("/health").status_code == 200


def test_what_is_kept_survives_the_server(
    start: Start, bundle: ClientBundle, alice: StoredKeys, bob: StoredKeys, body: bytes
) -> None:
    """Kill -9 with an upload half done and a run in work; then SIGTERM, which lets a run finish."""
    server = start()
    with server.http() as http:
        query = {"offset": 0, "size": bob.evaluation.stat().st_size}
        part = bob.evaluation.read_bytes()[:1_000_000]
        http.patch(f"/v1/keys/{bob.id}", params=query, content=part)
        upload(http, alice)
        done = Asked(http, bundle, alice.id, body)
        done.check_done(bundle)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        lost = Asked(http, bundle, alice.id, body)
        server.stop(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(worker)  # it dies with its server
    server = start(store=server.store)
    with server.http() as http:
        assert http.get(f"/v1/keys/{bob.id}").json()["received"] == 1_000_000
        assert Asked(http, bundle, alice.id, body, done.id).answer.json()["state"] == "done"
        assert http.get(lost.where).status_code == 404
        last = Asked(http, bundle, alice.id, body)
        assert server.stop() == 0
    server = start(store=server.store)
    with server.http() as http:
        assert http.get(last.where).json()["state"] == "done"
        Asked(http, bundle, alice.id, body, last.id).check_done(bundle)


def test_a_store_has_one_server(server: Server, exported: Path) -> None:
    with pytest.raises(OptionsError, match="is used by another server"):
        serve(exported / "server", ServeOptions(port=0, key_store=server.store))


def test_unsafe_settings_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="everybody could use it"):
        serve(exported / "server", ServeOptions(host="0.0.0.0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionsError, match=f"127.0.0.1:{port} cannot be listened on"):
            serve(exported / "server", ServeOptions(port=port, key_store=tmp_path / "store"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no token, so nobody could enter"),
        ("alice\n", "line 1: write TENANT TOKEN"),
        ("# fine\n../evil 01234567890123456789\n", "line 2: write TENANT TOKEN"),
        ("alice short\n", "line 1: a token has at least 20 characters"),
        ("a 01234567890123456789\nb 01234567890123456789\n", "line 2: this token has two tenants"),
    ],
)
def test_token_files_are_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tokens"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(OptionsError, match=message):
        Tokens.read(path)


def test_a_token_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("alice 01234567890123456789\n")
    path.chmod(0o644)
    with pytest.raises(OptionsError, match=r"others can read it \(mode 0644\)"):
        Tokens.read(path)
    path.chmod(0o600)
    assert Tokens.read(path).tenant("Bearer 01234567890123456789") == "alice"
    assert Tokens.read(path).tenant("Bearer 0123456789012345678") is None

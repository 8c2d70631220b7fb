"""A small export, its keys, and real server processes on a free port of the loopback."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from fhe_fx.export import export_region
from fhe_fx.runtime.region import Region
from fhe_fx.serving.keys import StoredKeys, keygen
from tests.export.conftest import make_region

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A process of `fhe-fx serve`."""

    process: subprocess.Popen[str]
    url: str
    store: Path
    log: Path
    tokens: dict[str, str]

    def http(self, tenant: str = "alice") -> httpx.Client:
        """Return a client with a tenant's token."""
        headers = {"Authorization": f"Bearer {self.tokens.get(tenant, tenant)}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def workers(self) -> list[int]:
        """List the processes that the server started."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return [int(n) for n in Path(path).read_text().split()]


Start = Callable[..., Server]


@contextmanager
def halted(server: Server) -> Iterator[int]:
    """Stop the worker in its tracks, so that a run stays where it is."""
    (worker,) = server.workers()
    os.kill(worker, signal.SIGSTOP)
    try:
        yield worker
    finally:
        if Path(f"/proc/{worker}").exists():
            os.kill(worker, signal.SIGCONT)


@pytest.fixture(scope="session")
def served_region() -> Region:
    return make_region()


@pytest.fixture(scope="session")
def exported(served_region: Region, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export; not to be changed."""
    directory = tmp_path_factory.mktemp("serving") / "out"
    export_region(served_region, directory, validate=False)
    return directory


@pytest.fixture(scope="session")
def alice(exported: Path) -> StoredKeys:
    """Return keys of a first tenant, where `connect` looks for them."""
    return keygen(exported / "client")


@pytest.fixture(scope="session")
def bob(exported: Path) -> StoredKeys:
    """Return keys of a second tenant."""
    return keygen(exported / "client", exported.with_name("bob.keys"))


@pytest.fixture(scope="module")
def start(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Return what starts a server; it is stopped when the module's tests end."""
    running: list[Server] = []
    tokens = {who: secrets.token_urlsafe(24) for who in ("alice", "bob", "carol")}

    def begin(*options: object, store: Path | None = None, directory: Path | None = None) -> Server:
        folder = tmp_path_factory.mktemp("server")
        token_file = folder / "tokens"
        token_file.touch(0o600)
        token_file.write_text("".join(f"{who} {token}\n" for who, token in tokens.items()))
        store = store or folder / "store"
        arguments: list[object] = [
            "serve", directory or exported / "server", "--port", 0, "--token-file", token_file,
            "--key-store", store, *options,
        ]  # fmt: skip
        log = folder / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "fhe_fx", *map(str, arguments)],
                stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), log.read_text()
        running.append(Server(process, url, store, log, tokens))
        return running[-1]

    yield begin
    for server in running:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)
        assert server.process.stdout is not None
        server.process.stdout.close()
        shutil.rmtree(server.store, ignore_errors=True)


@pytest.fixture(scope="module")
def server(start: Start) -> Server:
    """Return a server that the tests of a module share."""
    return start("--queue", 4, "--timeout", 60)


def error_of(response: httpx.Response) -> str:
    """Return the message of a refusal."""
    body: dict[str, Any] = response.json()
    return str(body["error"]["message"])

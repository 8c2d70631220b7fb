"""What slow senders, wrong methods and a full disk meet."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fhe_fx.serving import server as server_module
from fhe_fx.serving.worker import Worker
from tests.serving.conftest import Server

HEAD_SECONDS = 0.5


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """Answer every request, once its body has come."""
    while (await receive()).get("more_body"):
        pass
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"hi"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Return the port of a server with the protocol of ours, and little patience."""
    monkeypatch.setattr(server_module, "HEAD_SECONDS", HEAD_SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            hello, http=server_module._Impatient, lifespan="off", log_config=None, access_log=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)


def ends_by_itself(connection: socket.socket) -> bool:
    """Send a byte now and then, and say whether the other side gives up."""
    connection.settimeout(HEAD_SECONDS / 4)
    for _ in range(40):
        try:
            connection.sendall(b"a")
            if connection.recv(1000) == b"":
                return True
        except TimeoutError:  # noqa: PERF203 -- one byte, one chance to be cut off
            continue
        except OSError:
            return True
    return False


def test_a_head_that_never_ends_is_cut_off(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert ends_by_itself(connection)


def test_so_is_one_behind_a_request(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        found = b""
        while not found.endswith(b"hi"):  # head and body may come apart
            part = connection.recv(1000)
            assert part, found
            found += part
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert ends_by_itself(connection)


def test_bodies_and_pauses_may_take_longer(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def body() -> Iterator[bytes]:
        for _ in range(4):
            time.sleep(HEAD_SECONDS / 2)
            yield b"a"

    for pause in (0.0, 2 * HEAD_SECONDS):
        time.sleep(pause)
        connection.request("PUT", "/", body(), {"Content-Length": "4"})
        assert connection.getresponse().read() == b"hi"
    connection.close()


@pytest.mark.fhe
def test_a_wrong_method_is_told_all_right_ones(server: Server) -> None:
    paths = {
        f"/v1/keys/{'0' * 64}": "DELETE, GET, PATCH",
        f"/v1/runs/{'0' * 32}": "DELETE, GET, PUT",
        "/health": "GET",
    }
    with server.http() as http:
        for path, methods in paths.items():
            answer = http.request("BREW", path)
            assert answer.status_code == 405
            assert answer.headers["allow"] == methods


def test_a_worker_that_cannot_write_says_so_and_lives(tmp_path: Path) -> None:
    circuits = {"c": {"folder": "", "wire": {"inputs": 1, "results": []}, "key_bytes": 1}}
    job = {"circuit": "c", "keys": "k", "inputs": str(tmp_path / "none"), "result": "r"}
    answer = Worker(circuits, 0).answer(job)
    assert answer == {
        "ok": False, "kind": "storage",
        "message": "The server cannot read or keep a file: No such file or directory.",
    }  # fmt: skip

"""Sends a server thousands of hostile requests, and counts what it answered. Loopback only.

    python benchmarks/stress.py                  # 10,000 requests, 50 clients at once
    python benchmarks/stress.py --requests 500

Requests come from a seeded generator: random bytes, truncated and bit-flipped keys and inputs,
the run and the key of another tenant, wrong methods, sizes and queries. Halfway the worker is
killed. The command fails if the server dies, answers 500, gives a tenant anything of another, or
does not run an honest client's circuit at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import hashlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch import nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.export import export_region, load_client_bundle
from fhe_fx.report.machine import machine_name
from fhe_fx.serving.keys import StoredKeys, keygen
from fhe_fx.serving.wire import pack_inputs

TENANTS = ("honest", "hostile")


def main() -> None:
    """Print one JSON object; exit with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600, help="stop asking after so long")
    choices = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored = export_small(folder)
        tokens = {who: secrets.token_urlsafe(24) for who in TENANTS}
        token_file = folder / "tokens"
        token_file.touch(0o600)
        token_file.write_text("".join(f"{who} {token}\n" for who, token in tokens.items()))
        with (folder / "log").open("w") as log, subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "fhe_fx", "serve", str(folder / "out/server"),
             "--port", "0", "--token-file", str(token_file)],
            stdout=subprocess.PIPE, stderr=log, text=True,
        ) as server:  # fmt: skip
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            try:
                found = _attack(url, folder, stored, tokens, server.pid, choices)
                found["server_is_alive"] = server.poll() is None
            finally:
                server.send_signal(signal.SIGTERM)
        log_text = (folder / "log").read_text()
        found["faults_logged"] = log_text.count('"event": "fault"')
        found["log_bytes"] = len(log_text)
    print(json.dumps(found, indent=1))
    broken = found["status"].get(500, 0) or found["leaks"] or found["faults_logged"]
    if broken or not found["server_is_alive"] or not found["honest_error"] < 0.5:
        raise SystemExit(1)


def export_small(folder: Path) -> StoredKeys:
    """Export a small circuit, make keys for it, and keep a sample of what it computes."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    samples = [torch.randn(1, 6) for _ in range(32)]
    model = fhe_fx.encrypt_submodule(nn.Sequential(body), "0", calibration=samples)
    export_region(encrypted_modules(model)[0].region, folder / "out", validate=False)
    torch.save({"x": samples[0], "y": model(samples[0]).detach()}, folder / "sample.pt")
    return keygen(folder / "out/client")


def _attack(
    url: str,
    folder: Path,
    stored: StoredKeys,
    tokens: dict[str, str],
    pid: int,
    choices: argparse.Namespace,
) -> dict[str, Any]:
    client = folder / "out/client"
    sample = torch.load(folder / "sample.pt", weights_only=True)
    with fhe_fx.connect(url, client=client, token=tokens["honest"]) as honest:
        honest.run([sample["x"]])
        attack = _Attack(url, client, stored, tokens, pid, choices)
        attack.ask_honestly()
        start = time.monotonic()
        asyncio.run(attack.run())
        seconds = time.monotonic() - start
        attack.leaks += attack.ask_honestly() != 200
        error = honest.run([sample["x"]])[0] - sample["y"]
    return {
        "machine": machine_name(), "requests": attack.sent, "clients": choices.clients,
        "seconds": round(seconds, 1), "status": dict(sorted(attack.status.items())),
        "cut_off": attack.cut, "leaks": attack.leaks,
        "peak_megabytes_server_and_worker": round(attack.peak / 1e6),
        "honest_error": round(float(error.norm() / sample["y"].norm()), 3),
    }  # fmt: skip


class _Attack:
    """Clients that ask for everything but what they may have."""

    def __init__(
        self,
        url: str,
        client: Path,
        stored: StoredKeys,
        tokens: dict[str, str],
        pid: int,
        choices: argparse.Namespace,
    ) -> None:
        from fhe_fx.backends.concrete.parties import ConcreteClient

        bundle = load_client_bundle(client)
        party = ConcreteClient(bundle.specs)
        party.load(stored.read_secret(bundle.manifest["keyset"], None))
        self.body = pack_inputs(party.encrypt([np.zeros((1, 6), np.int64)]))
        self.circuit, self.key = str(bundle.manifest["bundle"]), stored.id
        self.key_bytes = stored.evaluation.read_bytes()
        self.url, self.tokens, self.pid, self.choices = url, tokens, pid, choices
        self.sent = self.cut = self.leaks = self.peak = 0
        self.status: collections.Counter[int] = collections.Counter()
        self.random = random.Random(0)
        self.honest_run = secrets.token_hex(16)
        self.until = time.monotonic() + choices.seconds

    async def run(self) -> None:
        """Send all requests."""
        headers = {"Authorization": f"Bearer {self.tokens['hostile']}"}
        limits = httpx.Limits(max_connections=self.choices.clients)
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=60, limits=limits
        ) as http:
            await http.patch(
                f"/v1/keys/{self.key}", params={"offset": 0, "size": len(self.key_bytes)},
                content=self.key_bytes,
            )  # fmt: skip
            await asyncio.gather(*(self._client(http) for _ in range(self.choices.clients)))

    async def _client(self, http: httpx.AsyncClient) -> None:
        while self.sent < self.choices.requests and time.monotonic() < self.until:
            self.sent += 1
            if self.sent == self.choices.requests // 2:
                self._kill_worker()
            if self.sent % 200 == 0:
                self._weigh()
            ask = self.random.choice(
                (self._bad_input, self._bad_input, self._foreign, self._bad_key, self._nonsense)
            )
            try:
                answer = await ask(http)
            except httpx.TransportError:
                self.cut += 1  # closed before the body was read
            else:
                self.status[answer.status_code] += 1

    def _workers(self) -> list[int]:
        return [
            int(n) for n in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        ]

    def _kill_worker(self) -> None:
        for worker in self._workers():
            os.kill(worker, signal.SIGKILL)

    def _weigh(self) -> None:
        pages = 0
        for process in (self.pid, *self._workers()):
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        self.peak = max(self.peak, pages * os.sysconf("SC_PAGE_SIZE"))

    def _mangled(self, content: bytes) -> bytes:
        kind = self.random.randrange(4)
        if kind == 0:
            return content[: self.random.randrange(len(content))]
        if kind == 1:
            return self.random.randbytes(self.random.randrange(1, 2000))
        flipped = bytearray(content)
        for _ in range(kind):
            flipped[self.random.randrange(min(len(flipped), 4096))] ^= self.random.randrange(1, 256)
        return bytes(flipped)

    async def _bad_input(self, http: httpx.AsyncClient) -> httpx.Response:
        query = {"circuit": self.circuit, "key": self.key}
        where = f"/v1/runs/{self.random.randbytes(16).hex()}"
        answer = await http.put(where, params=query, content=self._mangled(self.body))
        if answer.status_code == 202 and self.random.random() < 0.5:
            await http.get(where, params={"wait": 1})
            return await http.request(self.random.choice(("GET", "DELETE")), where)
        return answer

    async def _foreign(self, http: httpx.AsyncClient) -> httpx.Response:
        """Ask for what is another's, under the hostile tenant's token or nobody's."""
        method, path = self.random.choice(
            (("GET", ""), ("GET", "/result"), ("DELETE", ""), ("GET", "/../circuits"))
        )
        is_own = self.random.random() < 0.5
        token = self.tokens["hostile"] if is_own else secrets.token_urlsafe(24)
        answer = await http.request(
            method,
            f"/v1/runs/{self.honest_run}{path}",
            headers={"Authorization": f"Bearer {token}"},
        )
        self.leaks += answer.status_code in {200, 204} and not (is_own and ".." in path)
        return answer

    def ask_honestly(self) -> int:
        """Have a run of the honest tenant computed and kept, or look for it; return the status."""
        headers = {"Authorization": f"Bearer {self.tokens['honest']}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=60) as http:
            query = {"circuit": self.circuit, "key": self.key}
            http.put(f"/v1/runs/{self.honest_run}", params=query, content=self.body)
            http.get(f"/v1/runs/{self.honest_run}", params={"wait": 20})
            return http.get(f"/v1/runs/{self.honest_run}/result").status_code

    async def _bad_key(self, http: httpx.AsyncClient) -> httpx.Response:
        content = self._mangled(self.key_bytes[:50_000])
        key = self.random.choice(
            (hashlib.sha256(content).hexdigest(), self.random.randbytes(32).hex())
        )
        size = self.random.choice((len(content), len(content), 10 ** self.random.randrange(1, 15)))
        query = {"offset": self.random.choice((0, 0, 1, -1)), "size": size}
        answer = await http.patch(f"/v1/keys/{key}", params=query, content=content)
        if answer.status_code == 200 and answer.json()["is_complete"]:
            where = f"/v1/runs/{self.random.randbytes(16).hex()}"
            asked = {"circuit": self.circuit, "key": key}
            answer = await http.put(where, params=asked, content=self.body)
        await http.delete(f"/v1/keys/{key}")
        return answer

    async def _nonsense(self, http: httpx.AsyncClient) -> httpx.Response:
        path = self.random.choice(
            ("/v1/keys/..%2f..%2fetc", "/v1/runs/0", "/", "/v1/keys/" + "0" * 5000, "/v1/runs/%00",
             f"/v1/keys/{self.key}?offset=x&size=y", "/metrics", "/openapi.json")
        )  # fmt: skip
        method = self.random.choice(("GET", "PUT", "PATCH", "POST", "DELETE", "OPTIONS", "BREW"))
        if method == "DELETE" and self.key in path:
            method = "GET"
        return await http.request(method, path, content=self.random.randbytes(50))


if __name__ == "__main__":
    main()

"""Sends a server what its interface allows, sends it slowly, and fills its disk. Loopback only.

    python benchmarks/stress_edges.py                 # all three, about four minutes
    python benchmarks/stress_edges.py --only disk

*openapi*: schemathesis makes requests from the server's own description, valid and invalid, and
checks each answer against it. *slow*: senders that never end a head, and senders of a body of one
byte a second, while an honest client works. *disk*: the server's store is a file system of a few
megabytes (where user namespaces are allowed), filled to the last byte by another tenant.

The command fails if the server answers 500, dies, or does not run an honest client's circuit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from stress import TENANTS, export_small

import fhe_fx
from fhe_fx.errors import RemoteError
from fhe_fx.report.machine import machine_name
from fhe_fx.serving.client import Connection
from fhe_fx.serving.keys import StoredKeys, keygen

PHASES = ("openapi", "slow", "disk")
DISK_SPARE = 2_000_000
"""Bytes of the small disk beyond the honest client's keys and what the circuit takes."""


@dataclass
class Site:
    """An export, keys, tokens, and the result that an honest client expects."""

    folder: Path
    stored: StoredKeys
    tokens: dict[str, str]

    def http(self, url: str, tenant: str) -> httpx.Client:
        """Return a client with a tenant's token."""
        headers = {"Authorization": f"Bearer {self.tokens[tenant]}"}
        return httpx.Client(base_url=url, headers=headers, timeout=60)

    def honest_error(self, connection: Connection) -> float:
        """Have the circuit run, and return the relative error of its result."""
        sample = torch.load(self.folder / "sample.pt", weights_only=True)
        error = connection.run([sample["x"]])[0] - sample["y"]
        return float(error.norm() / sample["y"].norm())

    def connect(self, url: str) -> Connection:
        """Connect the honest client."""
        return fhe_fx.connect(url, client=self.folder / "out/client", token=self.tokens["honest"])


def main() -> None:
    """Print one JSON object; exit with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PHASES)
    parser.add_argument("--examples", type=int, default=300, help="of schemathesis, an operation")
    parser.add_argument("--senders", type=int, default=100)
    choices = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = Site(folder, export_small(folder), {w: secrets.token_urlsafe(24) for w in TENANTS})
        found: dict[str, Any] = {"machine": machine_name()}
        for phase in (choices.only,) if choices.only else PHASES:
            found[phase] = {
                "openapi": lambda: fuzz(site, choices.examples),
                "slow": lambda: send_slowly(site, choices.senders),
                "disk": lambda: fill_disk(site),
            }[phase]()
    print(json.dumps(found, indent=1))
    if any(found[phase]["broken"] for phase in PHASES if phase in found):
        raise SystemExit(1)


@contextlib.contextmanager
def served(site: Site, *options: object, before: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Run a server; give its URL, and a function that counts what went wrong in it."""
    token_file, log = site.folder / "tokens", site.folder / "log"
    token_file.touch(0o600)
    token_file.write_text("".join(f"{who} {token}\n" for who, token in site.tokens.items()))
    command = [
        *before, sys.executable, "-W", "ignore", "-m", "fhe_fx", "serve",
        site.folder / "out/server", "--port", 0, "--token-file", token_file, *options,
    ]  # fmt: skip
    with log.open("w") as errors, subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=errors, text=True
    ) as server:  # fmt: skip

        def faults() -> int:
            text = log.read_text()
            return text.count('"event": "fault"') + (server.poll() is not None)

        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url, log.read_text()
        try:
            yield url, faults
        finally:
            server.send_signal(signal.SIGTERM)


# What the interface allows ---------------------------------------------------------------------


def fuzz(site: Site, examples: int) -> dict[str, Any]:
    """Let schemathesis ask; a valid body that holds no ciphertext is refused, which is no fault."""
    with served(site) as (url, faults), site.connect(url) as honest:
        command = [
            Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json",
            "--header", f"Authorization: Bearer {site.tokens['hostile']}",
            "--exclude-checks", "positive_data_acceptance",
            "--max-examples", examples, "--seed", 0, "--workers", 4,
        ]  # fmt: skip
        start = time.monotonic()
        run = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, check=False,
            cwd=site.folder,
        )  # fmt: skip
        generated = re.search(r"(\d+) generated", run.stdout)
        error = site.honest_error(honest)
        found = {
            "requests": int(generated.group(1)) if generated else 0,
            "unique_failures": re.findall(r"ST\d+ [^\n:]+", run.stdout),
            "seconds": round(time.monotonic() - start, 1),
            "faults": faults(),
            "honest_error": round(error, 3),
        }
    if run.returncode:
        sys.stderr.write(run.stdout)
    broken = bool(run.returncode or found["faults"] or not found["requests"] or not error < 0.5)
    return {**found, "broken": broken}


# Slow senders ----------------------------------------------------------------------------------


def send_slowly(site: Site, senders: int) -> dict[str, Any]:
    """Hold half of the connections by heads that never end, and half by bodies that crawl."""
    with served(site) as (url, faults), site.connect(url) as honest:
        site.honest_error(honest)

        async def everything() -> tuple[list[tuple[str, float]], list[float], float]:
            slow = [
                asyncio.create_task(_slow_sender(url, site, is_head=number % 2 == 0))
                for number in range(senders)
            ]
            waits, worst = [], 0.0
            while not all(s.done() for s in slow):
                start = time.monotonic()
                worst = max(worst, await asyncio.to_thread(site.honest_error, honest))
                waits.append(time.monotonic() - start)
                await asyncio.sleep(1)
            return [s.result() for s in slow], waits, worst

        ends, waits, error = asyncio.run(everything())
        found: dict[str, Any] = {"senders": senders, "faults": faults()}
    for kind in ("head", "body"):
        seconds = [s for k, s in ends if k == kind]
        found[f"cut_off_{kind}s"] = len(seconds)
        found[f"{kind}_seconds"] = [round(min(seconds)), round(max(seconds))] if seconds else []
    found |= {
        "honest_runs": len(waits),
        "honest_slowest_seconds": round(max(waits), 1),
        "honest_error": round(error, 3),
    }
    cut = found["cut_off_heads"] + found["cut_off_bodys"]
    return {**found, "broken": bool(found["faults"] or cut < senders or not error < 0.5)}


async def _slow_sender(url: str, site: Site, *, is_head: bool) -> tuple[str, float]:
    """Send a byte a second until the server ends it; return what was slow, and for how long."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    start = time.monotonic()
    head = (
        f"PATCH /v1/keys/{secrets.token_hex(32)}?offset=0&size=60000 HTTP/1.1\r\n"
        f"Host: {host}\r\nAuthorization: Bearer {site.tokens['hostile']}\r\n"
        f"Content-Length: 60000\r\n"
    )
    writer.write(head.encode() + (b"X: " if is_head else b"\r\n"))
    answer = b""
    with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
        while time.monotonic() < start + 120 and not reader.at_eof() and not answer:
            writer.write(b"a")
            await writer.drain()
            with contextlib.suppress(asyncio.TimeoutError):
                answer = await asyncio.wait_for(reader.read(1000), 1)
    seconds = time.monotonic() - start
    writer.close()
    is_ended = seconds < 120 and (is_head or b" 408 " in answer or b" 429 " in answer)
    return ("head" if is_head else "body") if is_ended else "never", seconds


# A full disk -----------------------------------------------------------------------------------


def fill_disk(site: Site) -> dict[str, Any]:
    """Fill the server's file system; ask; make room; ask again."""
    store = site.folder / "small"
    store.mkdir()
    size = site.stored.evaluation.stat().st_size + _folder_size(site) + DISK_SPARE
    mount = f'mount -t tmpfs -o size={size} tmpfs {store} && exec "$@"'
    before = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    with served(site, "--key-store", store, before=before) as (url, faults):
        with site.connect(url) as honest, site.http(url, "hostile") as hostile:
            site.honest_error(honest)
            kept = _fill(hostile)
            said = [
                _said(lambda: site.honest_error(honest)),
                _said(lambda: _new_keys(site, url)),
            ]
            status = hostile.get("/health").status_code
            for key in kept:
                hostile.delete(f"/v1/keys/{key}")
            error = site.honest_error(honest)
        found = {
            "disk_bytes": size, "filled_bytes": sum(kept.values()),
            "run_on_a_full_disk": said[0], "keys_on_a_full_disk": said[1],
            "health": status, "honest_error_afterwards": round(error, 3), "faults": faults(),
        }  # fmt: skip
    is_said = all("disk is full" in text for text in said)
    broken = bool(found["faults"] or status != 200 or not is_said or not error < 0.5)
    return {**found, "broken": broken}


def _said(attempt: Callable[[], object]) -> str:
    """Return what an attempt is refused with."""
    try:
        attempt()
    except RemoteError as error:
        return str(error)
    return "done"


def _folder_size(site: Site) -> int:
    """Return what the unpacked circuit takes, with a page for each file to spare."""
    from fhe_fx.export import load_server_bundle

    files = load_server_bundle(site.folder / "out/server").files
    return sum(len(content) + 8192 for content in files.values())


def _fill(http: httpx.Client) -> dict[str, int]:
    """Upload parts of keys until not a byte more is taken; return what is kept of each."""
    kept: dict[str, int] = {}
    for piece in (1_000_000, 4096, 1):
        key, status = secrets.token_hex(32), 200
        while status == 200:
            query = {"offset": kept.get(key, 0), "size": 100_000_000}
            answer = http.patch(f"/v1/keys/{key}", params=query, content=bytes(piece))
            status = answer.status_code
            kept[key] = int(http.get(f"/v1/keys/{key}").json()["received"])
    return kept


def _new_keys(site: Site, url: str) -> None:
    """Let the honest client bring other keys."""
    keys = site.folder / "other.keys"
    keygen(site.folder / "out/client", keys)
    client = site.folder / "out/client"
    fhe_fx.connect(url, client=client, keys=keys, token=site.tokens["honest"]).close()


if __name__ == "__main__":
    main()

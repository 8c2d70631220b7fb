"""Where runs are computed: an interface, and processes of this machine behind it.

An engine for many machines implements `Engine` and takes the place of `LocalPool`; nothing else
knows how a result comes about.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fhe_fx.errors import FheFxError

__all__ = ["Engine", "LocalPool", "RunFailedError", "Work"]


@dataclass(frozen=True)
class Work:
    """One run."""

    circuit: str
    """Bundle id."""
    keys: Path
    """Evaluation keys."""
    inputs: Path
    """A frame of encrypted inputs."""
    result: Path
    """Where the packed results are to be written."""


class RunFailedError(FheFxError):
    """A run gave no result; `kind` is a word for machines."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Engine(Protocol):
    """Computes runs."""

    slots: int
    """How many runs it computes at once; more are kept in the queue."""

    async def start(self) -> None:
        """Make ready."""

    async def run(self, work: Work) -> None:
        """Compute a run and write its result; cancelling the task stops the computation.

        Raises:
            RunFailedError: if there is no result.
        """

    async def close(self) -> None:
        """Stop everything."""


class LocalPool:
    """Worker processes of this machine, each with one run at a time."""

    def __init__(
        self, circuits: Mapping[str, Any], n_workers: int, memory: int, key_memory: int
    ) -> None:
        """Prepare.

        Args:
            circuits: what `Worker` takes, by bundle id.
            n_workers: processes; one run uses every core, so one is usually right.
            memory: bytes that a worker may use; 0 for no bound of its own.
            key_memory: bytes of evaluation keys that a worker keeps.
        """
        self.slots = n_workers
        self.restarts = 0
        settings = {
            "circuits": dict(circuits),
            "memory": memory,
            "key_memory": key_memory,
        }
        self._settings = json.dumps(settings)
        self._idle: asyncio.Queue[asyncio.subprocess.Process | None] = asyncio.Queue()
        self._all: set[asyncio.subprocess.Process] = set()

    async def start(self) -> None:
        """Start the workers."""
        for _ in range(self.slots):
            self._idle.put_nowait(await self._spawn())

    async def _spawn(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "ignore", "-m", "fhe_fx.serving.worker", self._settings,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._all.add(process)
        return process

    async def run(self, work: Work) -> None:
        """Give a run to an idle worker."""
        process = await self._idle.get()
        answer: dict[str, Any] | None = None
        try:
            if process is None or process.returncode is not None:
                process = await self._spawn()
            answer = await _ask(process, work)
        finally:
            if answer is None and process is not None:  # it died, or the run was cancelled
                self._kill(process)
                process = None
                self.restarts += 1
            self._idle.put_nowait(process)
        if answer is None:
            raise RunFailedError(
                "crashed", "The worker died on this run; nothing else is affected."
            )
        if not answer["ok"]:
            raise RunFailedError(answer["kind"], answer["message"])

    def _kill(self, process: asyncio.subprocess.Process) -> None:
        # Not `process.kill`: it collects a process that has just died before asyncio does, which
        # then knows nothing of how it ended. The session is the worker's own.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self._all.discard(process)

    async def close(self) -> None:
        """Kill the workers."""
        processes = list(self._all)
        for process in processes:
            self._kill(process)
        await asyncio.gather(*(p.wait() for p in processes))


async def _ask(process: asyncio.subprocess.Process, work: Work) -> dict[str, Any] | None:
    """Return a worker's answer, or None if it died."""
    assert process.stdin is not None
    assert process.stdout is not None
    job = {
        "circuit": work.circuit,
        "keys": str(work.keys),
        "inputs": str(work.inputs),
        "result": str(work.result),
    }
    try:
        process.stdin.write(json.dumps(job).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        answer = json.loads(line) if line.endswith(b"\n") else None
    except (ConnectionError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None

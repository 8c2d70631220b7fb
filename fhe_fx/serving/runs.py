"""The runs of a server: a bounded queue before the engine, results kept until they are fetched.

A run is named by the client, so that asking twice computes once. Finished runs survive a restart;
others are forgotten, and the client, which still has its input, asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fhe_fx.errors import FheFxError
from fhe_fx.serving.engine import Engine, RunFailedError, Work

__all__ = ["BusyError", "Limits", "Run", "Runs"]

FINISHED = ("done", "failed", "cancelled")


class BusyError(FheFxError):
    """No run is taken now; `status` is the HTTP status that says for whom."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Bounds of a server."""

    queue: int = 16
    """Runs that may wait or be computed, of all tenants."""
    tenant_queue: int = 8
    """Runs of one tenant that may wait or be computed."""
    timeout: float = 3600.0
    """Seconds that one run may take, waiting not counted."""
    kept: int = 32
    """Finished runs that are kept for one tenant."""
    kept_seconds: float = 3600.0
    """How long they are kept."""
    keys: int = 8
    """Evaluation keys of one tenant."""


@dataclass(eq=False)
class Run:
    """One run of a tenant."""

    id: str
    tenant: str
    folder: Path
    digest: str
    """Names circuit, keys and inputs, so that another request under the same id is noticed."""
    state: str = "queued"
    """queued, running, done, failed or cancelled."""
    kind: str = ""
    """Why it failed, in a word."""
    message: str = ""
    """Why it failed, in a sentence."""
    finished: float = 0.0
    """When, in seconds of the epoch."""
    seconds: float = 0.0
    """How long the engine took."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it is finished."""
    task: asyncio.Task[None] | None = None

    @property
    def result(self) -> Path:
        """Where its packed results are, once done."""
        return self.folder / "result"


class Runs:
    """All runs of a server."""

    def __init__(
        self,
        root: Path,
        engine: Engine,
        limits: Limits,
        on_finish: Callable[[Run], None] = lambda run: None,
    ) -> None:
        """Read the finished runs of an earlier server, and drop what it left unfinished."""
        self._root, self._engine, self._limits = root, engine, limits
        self._on_finish = on_finish
        self._slots = asyncio.Semaphore(engine.slots)
        self._runs: dict[tuple[str, str], Run] = {}
        self.is_draining = False
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in root.glob("*/*"):
            if (run := _restored(folder)) is not None:
                self._runs[run.tenant, run.id] = run
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def get(self, tenant: str, run_id: str) -> Run | None:
        """Return a run of a tenant, or None."""
        return self._runs.get((tenant, run_id))

    def active(self, tenant: str | None = None) -> int:
        """Count the runs that wait or are computed."""
        return sum(
            r.state not in FINISHED and tenant in {None, r.tenant} for r in self._runs.values()
        )

    def check_room(self, tenant: str) -> None:
        """Refuse a run before its input is read.

        Raises:
            BusyError: if the server shuts down, its queue is full, or the tenant's share of it is.
        """
        if self.is_draining:
            raise BusyError(503, "The server is shutting down; ask again in a moment.")
        if (active := self.active(tenant)) >= self._limits.tenant_queue:
            raise BusyError(429, f"{active} of your runs are in the queue, which is your share.")
        if (active := self.active()) >= self._limits.queue:
            raise BusyError(503, f"{active} runs are in the queue, which is full.")

    def submit(
        self, tenant: str, run_id: str, circuit: str, keys: Path, digest: str, body: bytes
    ) -> Run:
        """Take a run.

        Raises:
            BusyError: as `check_room`.
            OSError: if its input cannot be kept.
        """
        self.check_room(tenant)
        self._prune(tenant)
        run = Run(run_id, tenant, self._root / tenant / run_id, digest)
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(mode=0o700, parents=True)
        work = Work(circuit, keys, run.folder / "inputs", run.folder / "partial")
        try:
            work.inputs.write_bytes(body)
        except OSError:
            shutil.rmtree(run.folder, ignore_errors=True)
            raise
        self._runs[tenant, run_id] = run
        run.task = asyncio.create_task(self._compute(run, work))
        return run

    async def _compute(self, run: Run, work: Work) -> None:
        try:
            async with self._slots:
                await self._run(run, work)
            work.result.replace(run.result)
            _finish(run, "done")
        except asyncio.TimeoutError:
            limit = f"{self._limits.timeout:g}"
            _finish(run, "failed", "timeout", f"The run took longer than the {limit} s allowed.")
        except RunFailedError as error:
            _finish(run, "failed", error.kind, str(error))
        except OSError as error:
            _finish(run, "failed", "storage", f"The result cannot be kept: {error.strerror}.")
        except asyncio.CancelledError:
            kind = "shutdown" if self.is_draining else ""
            _finish(run, "cancelled", kind, "The run was cancelled.")
        finally:
            work.inputs.unlink(missing_ok=True)
            work.result.unlink(missing_ok=True)
            run.changed.set()
            self._on_finish(run)

    async def _run(self, run: Run, work: Work) -> None:
        if self.is_draining:
            raise asyncio.CancelledError
        run.state, start = "running", time.monotonic()
        try:
            await asyncio.wait_for(self._engine.run(work), self._limits.timeout)
        finally:
            run.seconds = time.monotonic() - start

    async def drop(self, run: Run) -> None:
        """Cancel a run if it is not finished, and forget it."""
        if run.task is not None and not run.task.done():
            run.task.cancel()
            await asyncio.wait([run.task])
            if not run.changed.is_set():  # cancelled before its first step
                _finish(run, "cancelled")
                run.changed.set()
        self._forget(run)

    def _forget(self, run: Run) -> None:
        self._runs.pop((run.tenant, run.id), None)
        shutil.rmtree(run.folder, ignore_errors=True)

    def _prune(self, tenant: str) -> None:
        old = [r for r in self._runs.values() if r.tenant == tenant and r.state in FINISHED]
        old.sort(key=lambda r: r.finished)
        oldest = time.time() - self._limits.kept_seconds
        for number, run in enumerate(old):
            if run.finished < oldest or number <= len(old) - self._limits.kept:
                self._forget(run)

    async def drain(self, seconds: float) -> None:
        """Take no more runs, give those that are computed `seconds`, and cancel the rest."""
        self.is_draining = True
        tasks = []
        for run in self._runs.values():
            if run.task is not None and not run.task.done():
                tasks.append(run.task)
                if run.state == "queued":
                    run.task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _finish(run: Run, state: str, kind: str = "", message: str = "") -> None:
    run.state, run.kind, run.message, run.finished = state, kind, message, time.time()
    if state == "done":
        described = {k: getattr(run, k) for k in ("digest", "state", "finished", "seconds")}
        partial = run.folder / "run.json.partial"
        partial.write_text(json.dumps(described))
        partial.replace(run.folder / "run.json")


def _restored(folder: Path) -> Run | None:
    run = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored: dict[str, Any] = json.loads((folder / "run.json").read_bytes())
        run = Run(folder.name, folder.parent.name, folder, str(stored["digest"]), "done")
        run.finished, run.seconds = float(stored["finished"]), float(stored["seconds"])
        run.changed.set()
    return run if run is not None and run.result.is_file() else None

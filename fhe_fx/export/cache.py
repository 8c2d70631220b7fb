"""What was lowered before, kept on disk under its content.

Entries decide what is computed, so the directory must be its owner's alone. A file appears whole or
not at all and states the sha256 of the rest of it; one that is damaged is removed, and what it held
is computed again.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from fhe_fx.capture.digest import digest_of_code, digest_of_model
from fhe_fx.errors import ArtifactError, OptionsError
from fhe_fx.export.lowered import lowered_from_bytes, lowered_to_bytes, lowering_key
from fhe_fx.export.manifest import versions
from fhe_fx.ir.program import Program
from fhe_fx.options import Options
from fhe_fx.passes.base import Pipeline
from fhe_fx.quant.calibration import Call, sample_from_model

__all__ = ["MOST_BYTES", "Cache", "Entry", "cache_directory"]

MOST_BYTES = 1 << 30
"""Bound of a cache where none is given."""
_SUFFIX = ".kept"
_PARTIAL = ".partial"
_ABANDONED_SECONDS = 3600.0


def cache_directory() -> Path:
    """Return where lowered programs are kept unless another directory is given."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fhe_fx" / "lowered"


@dataclass(frozen=True)
class Entry:
    """One file of a cache."""

    path: Path
    bytes: int
    used: float
    """When it was written or last read, in seconds since 1970."""

    @property
    def what(self) -> str:
        """What it holds: the region, or sampled calibration."""
        return self.path.name.rpartition("-")[0]


@dataclass(frozen=True)
class Cache:
    """A directory of lowered programs and sampled calibration, the least recently used go first.

    Several processes may use it at once.

    Raises:
        OptionsError: when it is used, if the directory can be written by others.
    """

    directory: Path = field(default_factory=cache_directory)
    """Made at the first entry."""
    most_bytes: int = MOST_BYTES
    """What the entries may take together."""

    def __post_init__(self) -> None:
        """Take a path that is written as text, too."""
        object.__setattr__(self, "directory", Path(self.directory))

    def lowered(self, captured: Program, pipeline: Pipeline) -> Program:
        """Return a region lowered by a pipeline, which is run unless that was done before.

        Args:
            captured: the region in float; left as it is.
            pipeline: what lowers it; it is run in any case if it writes dumps.
        """
        key = None if pipeline.dump_dir is not None else lowering_key(captured, pipeline)
        path = None if key is None else self._path(captured.name, key)
        if path is not None and (content := self._read(path)) is not None:
            try:
                return lowered_from_bytes(content, captured)
            except ArtifactError:
                path.unlink(missing_ok=True)
        program = copy.deepcopy(captured)
        pipeline.run(program)
        if path is not None and "integer" in program.properties:
            self._write(path, lowered_to_bytes(program))
        return program

    def sampled(self, model: nn.Module, tokens: int, options: Options) -> list[Call]:
        """Return calibration inputs that a language model writes, once for a model's content."""
        told = (
            digest_of_model(model),
            digest_of_code(),
            sorted(versions().items()),
            (tokens, options.n_samples, options.seed),
        )
        path = self._path("calibration", hashlib.sha256(repr(told).encode()).hexdigest())
        if (content := self._read(path)) is not None:
            with contextlib.suppress(Exception):  # whatever the bytes hold
                return _calls(safetensors.load(content)["ids"])
            path.unlink(missing_ok=True)
        calls = sample_from_model(model, tokens, options)
        self._write(
            path, safetensors.save({"ids": torch.cat([c.kwargs["input_ids"] for c in calls])})
        )
        return calls

    def entries(self) -> list[Entry]:
        """List what is kept, the most recently used first."""
        found = []
        for path in self.directory.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                known = path.stat()
                found.append(Entry(path, known.st_size, known.st_mtime))
        return sorted(found, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove all entries and return how many bytes that frees."""
        entries = self.entries()
        self._drop(entries)
        return sum(entry.bytes for entry in entries)

    def _path(self, what: str, key: str) -> Path:
        readable = re.sub(r"[^\w.]+", "_", what)[:80]
        return self.directory / f"{readable}-{key[:40]}{_SUFFIX}"

    def _read(self, path: Path) -> bytes | None:
        """Return the content of an entry; None if there is none, or it is damaged."""
        self._check()
        try:
            content = path.read_bytes()
        except OSError:
            return None
        stated, content = content[:64], content[64:]
        if hashlib.sha256(content).hexdigest().encode() != stated:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def _write(self, path: Path, content: bytes) -> None:
        """Write an entry whole or not at all, and drop the oldest beyond the bound."""
        if len(content) > self.most_bytes:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._check()
            partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
            try:
                with partial.open("xb") as file:
                    file.write(hashlib.sha256(content).hexdigest().encode())
                    file.write(content)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            self._trim()
        except OSError:
            return  # a cache that cannot be written costs time, nothing else

    def _trim(self) -> None:
        held = 0
        for entry in self.entries():
            held += entry.bytes
            if held > self.most_bytes:
                self._drop([entry])
        for path in self.directory.glob(f"*{_PARTIAL}"):  # left by a process that was ended
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()

    @staticmethod
    def _drop(entries: Sequence[Entry]) -> None:
        for entry in entries:
            entry.path.unlink(missing_ok=True)

    def _check(self) -> None:
        """Refuse a directory in which others could put an entry."""
        try:
            known = self.directory.stat()
        except OSError:
            return  # there is nothing to read
        is_shared = bool(known.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        if is_shared or known.st_uid != os.getuid():
            raise OptionsError(
                f"The cache {self.directory} can be written by others (owner {known.st_uid}, mode "
                f"{stat.S_IMODE(known.st_mode):o}), and what it holds decides what is computed. "
                f"Make it yours alone with chmod 700, or choose another."
            )


def _calls(ids: Tensor) -> list[Call]:
    return [Call((), {"input_ids": row[None]}) for row in ids]

"""Where evaluation keys are kept: an interface, and a directory behind it.

A key is named by its sha256, arrives in pieces that may be resumed, and is whole once its content
has that hash. Tenants have shelves of their own: one cannot ask for another's keys, nor find out by
an upload that is skipped whether another has them.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fhe_fx.errors import WireError
from fhe_fx.serving.keys import key_id

__all__ = ["DirectoryKeyStore", "KeyState", "KeyStore"]


@dataclass(frozen=True)
class KeyState:
    """How far an upload is."""

    received: int
    """Bytes that are kept."""
    is_complete: bool
    """Whether the key can be used."""


class KeyStore(Protocol):
    """Keeps evaluation keys over restarts. Calls may block; names were checked before."""

    def state(self, tenant: str, key: str) -> KeyState:
        """Say how far an upload is; an unknown key has no bytes."""

    def append(self, tenant: str, key: str, chunk: bytes) -> None:
        """Keep the next bytes of a key that is not complete."""

    def finish(self, tenant: str, key: str) -> None:
        """Check that all bytes came, and keep the key for good.

        Raises:
            WireError: if the content has another hash; it is dropped.
        """

    def fetch(self, tenant: str, key: str) -> Path | None:
        """Return a local file with the key, or None if there is no complete one."""

    def delete(self, tenant: str, key: str) -> None:
        """Drop a key, or what came of it."""

    def keys(self, tenant: str) -> list[str]:
        """List the keys of a tenant, complete or not."""


class DirectoryKeyStore:
    """One private file for each key, in one directory for each tenant."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, tenant: str, key: str, suffix: str = "") -> Path:
        return self._root / tenant / f"{key}{suffix}"

    def state(self, tenant: str, key: str) -> KeyState:
        """Say how far an upload is."""
        for suffix, is_complete in (("", True), (".partial", False)):
            with contextlib.suppress(FileNotFoundError):
                size = self._path(tenant, key, suffix).stat().st_size
                return KeyState(size, is_complete)
        return KeyState(0, False)

    def append(self, tenant: str, key: str, chunk: bytes) -> None:
        """Keep the next bytes."""
        path = self._path(tenant, key, ".partial")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(chunk)

    def finish(self, tenant: str, key: str) -> None:
        """Check the hash, and let the key appear under its name."""
        partial = self._path(tenant, key, ".partial")
        if key_id(partial) != key:
            partial.unlink(missing_ok=True)
            raise WireError(
                "The bytes that came have another sha256 than their key id; send again."
            )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self._path(tenant, key))
        _sync(partial.parent)

    def fetch(self, tenant: str, key: str) -> Path | None:
        """Return the file of a complete key."""
        path = self._path(tenant, key)
        return path if path.is_file() else None

    def delete(self, tenant: str, key: str) -> None:
        """Drop a key."""
        for suffix in ("", ".partial"):
            self._path(tenant, key, suffix).unlink(missing_ok=True)

    def keys(self, tenant: str) -> list[str]:
        """List the keys of a tenant."""
        held = (self._root / tenant).glob("*")
        return sorted({p.name.removesuffix(".partial") for p in held})


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

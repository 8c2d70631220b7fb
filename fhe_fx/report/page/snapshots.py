"""Reads what `dump_dir` wrote, under limits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fhe_fx.errors import InputError

__all__ = ["read_snapshots"]

_MAX_BYTES = 64 << 20
_NEEDED = {"pass", "number", "notes", "name", "stage", "results", "nodes"}


def read_snapshots(directory: Path) -> list[dict[str, Any]]:
    """Read the snapshots of a lowering, in order.

    Args:
        directory: what `dump_dir` wrote for one program, or a directory that holds one such.

    Raises:
        InputError: if there is none, or a file is not a snapshot.
    """
    files = _files(directory)
    if not files and directory.is_dir():
        holders = [d for d in sorted(directory.iterdir()) if d.is_dir() and _files(d)]
        if len(holders) > 1:
            raise InputError(
                f"{directory} holds {len(holders)} programs: {', '.join(d.name for d in holders)}. "
                f"Give one, such as {holders[0]}."
            )
        files = _files(holders[0]) if holders else []
    if not files:
        raise InputError(
            f"{directory} holds no dump of a lowering. Make one with FHE_FX_DUMP={directory} "
            f"before fhe-fx, or encrypt_submodule(..., dump_dir={str(directory)!r})."
        )
    return [_read(file) for file in files]


def _files(directory: Path) -> list[Path]:
    return sorted(
        (f for f in directory.glob("*.json") if re.match(r"\d\d+-", f.name)),
        key=lambda f: int(f.name.partition("-")[0]),
    )


def _read(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _MAX_BYTES:
        raise InputError(
            f"{file} has {file.stat().st_size:,} bytes; at most {_MAX_BYTES:,} are read."
        )
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}.") from error
    if not isinstance(data, dict) or not set(data) >= _NEEDED:
        raise InputError(f"{file} is not a snapshot of a program.")
    return data

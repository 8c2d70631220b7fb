"""Reads what `dump_dir` wrote, under limits."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from fhe_fx.errors import InputError

__all__ = ["read_snapshots"]

_MAX_BYTES = 64 << 20
_KINDS: dict[str, type] = {
    "pass": str,
    "number": int,
    "notes": list,
    "name": str,
    "stage": str,
    "results": list,
    "nodes": list,
}
_NODE_KINDS: dict[str, type] = {
    **dict.fromkeys(("name", "statement", "operator", "kind", "type", "bounds"), str),
    **dict.fromkeys(("module_path", "source", "made_by"), str),
    **dict.fromkeys(("shape", "inputs"), list),
    "look_ups": int,
}


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
    if fault := _fault(data, _KINDS):
        raise InputError(f"{file} is not a snapshot of a program: {fault}.")
    for number, node in enumerate(data["nodes"]):
        if fault := _fault(node, _NODE_KINDS):
            raise InputError(f"{file} is not a snapshot of a program: node {number}: {fault}.")
    known = {node["name"] for node in data["nodes"]}
    read = itertools.chain(data["results"], *(node["inputs"] for node in data["nodes"]))
    for name in read:
        if name not in known:
            raise InputError(f"{file} is not a snapshot of a program: there is no node {name!r}.")
    return data  # type: ignore[no-any-return]


def _fault(data: object, kinds: dict[str, type]) -> str | None:
    """Say which entry is missing, or of another kind than a snapshot's."""
    if not isinstance(data, dict):
        return f"it is a {type(data).__name__}, not an object"
    for name, kind in kinds.items():
        if not isinstance(data.get(name), kind):
            return f"{name!r} is {data.get(name)!r:.40}, not of {kind.__name__}"
    return None

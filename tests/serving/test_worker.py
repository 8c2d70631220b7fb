"""The worker's memory of evaluation keys, and what it answers to bad jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fhe_fx.backends.concrete import parties
from fhe_fx.serving.wire import pack_inputs
from fhe_fx.serving.worker import Worker


def _key(folder: Path, name: str) -> Path:
    """Write a message of one segment, 80 bytes in all."""
    path = folder / name
    path.write_bytes((9 << 32).to_bytes(8, "little") + name.encode() * 72)
    return path


def test_keys_used_last_are_kept_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parsed: list[bytes] = []

    def parse(content: bytes) -> Any:
        parsed.append(content[-1:])
        return content

    monkeypatch.setattr(parties, "parse_evaluation_keys", parse)
    worker = Worker({}, key_memory=250)  # two keys of 80 bytes, with 20 for their masks
    a, b, c = (_key(tmp_path, name) for name in "abc")
    for path in (a, b, a, c, a, b, b):
        assert worker._evaluation_keys(path, 20) == path.read_bytes()
    # b is forgotten for c, being used before a; then c for b.
    assert b"".join(parsed) == b"abcb"
    # A key larger than the bound is used all the same, alone.
    worker = Worker({}, key_memory=10)
    for path in (a, a, b, a):
        worker._evaluation_keys(path, 20)
    assert b"".join(parsed) == b"abcb" + b"aba"


def test_bad_jobs_are_answered(tmp_path: Path) -> None:
    worker = Worker({"id": {"folder": "none", "wire": {"inputs": 1}, "key_bytes": 0}}, 10**9)
    job = {
        "circuit": "id", "keys": str(_key(tmp_path, "k")), "inputs": str(tmp_path / "inputs"),
        "result": str(tmp_path / "result"),
    }  # fmt: skip
    (tmp_path / "inputs").write_bytes(b"garbage")
    assert worker.answer(job) == {
        "ok": False, "kind": "malformed", "message": "The body is not a frame of inputs.",
    }  # fmt: skip
    (tmp_path / "inputs").write_bytes(pack_inputs([(1 << 32).to_bytes(8, "little") + bytes(8)]))
    (tmp_path / "k").write_bytes(b"short")
    assert worker.answer(job)["message"] == ("A message has 5 bytes; that is not even its header.")
    assert not (tmp_path / "result").exists()

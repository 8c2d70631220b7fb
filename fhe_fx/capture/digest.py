"""Hashes of what a lowering depends on: a model's content, and the compiler's own code."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["bytes_of", "digest_of_code", "digest_of_model"]


def digest_of_model(model: nn.Module) -> str:
    """Return a hash of a model's class, configuration and weights."""
    found = hashlib.sha256(type(model).__qualname__.encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        found.update(config.to_json_string().encode())
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(bytes_of(value))
    return found.hexdigest()


def bytes_of(value: Tensor) -> memoryview:
    """Return the numbers of a tensor, row by row, as they stand in memory."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@functools.cache
def digest_of_code() -> str:
    """Return a hash of this package, so that results of another compiler are not taken for ours."""
    found = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()

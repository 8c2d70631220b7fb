"""The texts of an evaluation: read from a file, or written by the model itself and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fhe_fx.capture.digest import digest_of_model
from fhe_fx.errors import CalibrationError, FheFxError, OptionsError, did_you_mean
from fhe_fx.options import Options
from fhe_fx.quant.calibration import sample_from_model

__all__ = [
    "LONG",
    "DataError",
    "Texts",
    "cache_directory",
    "digest_of_rows",
    "overlap",
    "read_texts",
    "sample_texts",
]

LONG = ("cut", "split", "error")
"""What is done with a line of more tokens than the circuit has rows."""
_BATCH = 64
_KEPT_FILES, _KEPT_BYTES = 64, 64 << 20
"""Bounds of the cache of sampled texts; the oldest go first."""


class DataError(FheFxError, ValueError):
    """The texts to evaluate on are missing, malformed, or do not fit the circuit."""


@dataclass(frozen=True)
class Texts:
    """Sentences as token numbers."""

    rows: tuple[Tensor, ...]
    """One sentence each, `[n_tokens]`, none longer than the circuit."""
    origin: str
    """Where they come from, in words."""
    notes: tuple[str, ...] = ()
    """What was done to make them fit."""


def read_texts(path: Path, tokenizer: Any, tokens: int, long: str = "cut") -> Texts:
    """Read a sentence from every line that is not blank.

    Args:
        path: a UTF-8 text file.
        tokenizer: of the model.
        tokens: rows of the circuit.
        long: what to do with longer lines: "cut" them, "split" them into several sentences, or
            "error".

    Raises:
        DataError: if the file is missing, empty or not UTF-8, or has longer lines and may not.
        OptionsError: if `long` is none of these.
    """
    if long not in LONG:
        raise OptionsError(
            f"--long {long!r} is not one of {', '.join(LONG)}.{did_you_mean(long, list(LONG))}"
        )
    ids = [torch.tensor(tokenizer(line)["input_ids"], dtype=torch.int64) for line in _lines(path)]
    longer = [row for row in ids if len(row) > tokens]
    notes = []
    if longer:
        most = max(len(row) for row in longer)
        said = f"{len(longer)} of {len(ids)} lines have more than {tokens} tokens, up to {most}"
        if long == "error":
            raise DataError(f"{path}: {said}. Give --tokens {most}, or --long cut or split.")
        notes.append(f"{said}; they were {'cut' if long == 'cut' else 'split'}")
    rows = [part for row in ids for part in (row.split(tokens) if len(row) else ())]
    if long == "cut":
        rows = [row[:tokens] for row in ids if len(row)]
    if not rows:
        raise DataError(f"{path}: the tokenizer makes no token of any line.")
    return Texts(tuple(rows), str(path), tuple(notes))


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}. "
            f"Convert it, for instance with iconv -t UTF-8."
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no sentence. Give one a line.")
    return lines


def overlap(rows: Sequence[Tensor], calibration: Sequence[Tensor]) -> float:
    """Return the share of sentences that also stand, whole, somewhere in the calibration texts."""
    known = "|".join(f" {' '.join(map(str, row.tolist()))} " for row in calibration)
    return sum(f" {' '.join(map(str, row.tolist()))} " in known for row in rows) / max(1, len(rows))


# Texts that the model writes ------------------------------------------------------------------


def sample_texts(
    model: nn.Module,
    n: int,
    tokens: int,
    seed: int,
    *,
    digest: str | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[Tensor]:
    """Let a language model write `n` texts of `tokens` tokens, at temperature one.

    They are kept on disk under the content of the model, so the next call reads them.

    Args:
        model: with `generate`; a model without is sampled token by token.
        n: how many texts.
        tokens: length of each, without the start token.
        seed: of the sampling.
        digest: `digest_of_model(model)`, if it is known already.
        on_progress: is told what is being done.

    Raises:
        CalibrationError: if the model has no vocabulary to sample from.
    """
    key = hashlib.sha256(
        f"1 {digest or digest_of_model(model)} {n} {tokens} {seed}".encode()
    ).hexdigest()
    path = cache_directory() / f"{key[:32]}.npy"
    kept = _load(path, (n, tokens))
    if kept is None:
        on_progress(f"sampling {n} texts of {tokens} tokens from the model")
        was_training = model.training
        model.eval()
        try:
            kept = torch.cat([_sampled(model, n, tokens, seed, i) for i in range(0, n, _BATCH)])
        finally:
            model.train(was_training)
        _store(path, kept)
    return list(kept)


def _sampled(model: nn.Module, n: int, tokens: int, seed: int, start: int) -> Tensor:
    count, seed = min(_BATCH, n - start), seed * 1_000_003 + start
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    first: Any = getattr(config, "bos_token_id", None)
    if not hasattr(model, "generate") or not isinstance(size, int):
        calls = sample_from_model(model, tokens, Options(n_samples=max(2, count), seed=seed))
        return torch.cat([c.kwargs["input_ids"] for c in calls])[:count]
    room = getattr(config, "max_position_embeddings", None) or tokens + 1
    if tokens >= room:
        raise CalibrationError(
            f"The model has {room} positions; a start and {tokens} tokens do not fit. "
            f"Use at most {room - 1} tokens."
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        is_known = isinstance(first, int) and first < size
        begin = torch.full((count, 1), first) if is_known else torch.randint(size, (count, 1))
        found: Tensor = model.generate(  # type: ignore[operator]
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            use_cache=True,
            pad_token_id=0,
        )
    return found[:, 1 : tokens + 1]


def digest_of_rows(rows: Sequence[Tensor]) -> str:
    """Return a hash of token rows."""
    found = hashlib.sha256()
    for row in rows:
        found.update(f"{row.reshape(-1).tolist()}\n".encode())
    return found.hexdigest()


def cache_directory() -> Path:
    """Return where sampled texts are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fhe_fx" / "texts"


def _load(path: Path, shape: tuple[int, int]) -> Tensor | None:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if array.dtype != np.int64 or array.shape != shape or (array.size and array.min() < 0):
        return None
    return torch.from_numpy(array)


def _store(path: Path, rows: Tensor) -> None:
    """Write a file whole or not at all, and drop the oldest beyond the bounds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        with partial.open("wb") as file:
            np.save(file, rows.numpy(), allow_pickle=False)
        os.replace(partial, path)
        held = 0
        found = sorted(path.parent.glob("*.npy"), key=lambda p: -p.stat().st_mtime_ns)
        for number, old in enumerate(found):
            held += old.stat().st_size
            if number >= _KEPT_FILES or held > _KEPT_BYTES:
                old.unlink(missing_ok=True)
    except OSError:
        return  # a cache that cannot be written costs time, nothing else

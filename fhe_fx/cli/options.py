"""The options that commands share, and what their words mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fhe_fx.errors import OptionsError

if TYPE_CHECKING:
    from fhe_fx.options import Options

__all__ = [
    "AsJson",
    "Calibration",
    "Heads",
    "Lengths",
    "Model",
    "NBits",
    "PError",
    "Passes",
    "PassphraseFile",
    "Seed",
    "Submodule",
    "Submodules",
    "Tokens",
    "head_numbers",
    "lengths_of",
    "options_of",
    "passphrase_of",
]

Submodule = Annotated[
    str | None,
    typer.Option(help="Part to encrypt: a path, a unique suffix, a glob or re:... that names one."),
]
Submodules = Annotated[
    list[str] | None,
    typer.Option(
        "--submodule",
        help="Part to encrypt: a path, a unique suffix, a glob or re:...; once for each.",
    ),
]
NBits = Annotated[int, typer.Option(help="Bits of a quantized activation.")]
Tokens = Annotated[
    int | None, typer.Option(help="Rows of the circuit; by default 8, or as calibration has.")
]
Lengths = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        help="Rows of the circuit; or of several with keys in common, as in 4,8,16. By default 8, "
        "or as calibration has.",
    ),
]
Heads = Annotated[
    str | None, typer.Option(help="Encrypt these heads of an attention only, as in 0 or 0,3.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Sentences, one a line, or a .npy of inputs; else the model writes its own."),
]
PError = Annotated[
    float | None, typer.Option(help="Probability that a look-up reads the neighbouring entry.")
]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="Its text encrypts the secret keys, or decrypts them.")
]
Seed = Annotated[int, typer.Option(help="Of random weights and of sampled calibration.")]
Passes = Annotated[
    str | None,
    typer.Option(
        "--passes",
        help="A .toml file, or text: default,-drop-this,my-pass{option=1}@before:that.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face directory or hub name, smollm2, random:gpt2, or a .pt2 file."
    ),
]


def head_numbers(heads: str | None) -> list[int] | None:
    """Read `0` or `0,3`.

    Raises:
        OptionsError: if it is neither.
    """
    if heads is None:
        return None
    try:
        return [int(h) for h in heads.split(",")]
    except ValueError:
        raise OptionsError(
            f"--heads {heads!r} is not a list of numbers. Write 0, or 0,3."
        ) from None


def lengths_of(text: str) -> tuple[int, ...]:
    """Read `8` or `4,8,16`.

    Raises:
        OptionsError: if it is neither.
    """
    try:
        found = tuple(int(n) for n in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise OptionsError(f"--tokens {text!r} is not a list of lengths. Write 8, or 4,8,16.")
    return found


def options_of(n_bits: int, seed: int, p_error: float | None) -> Options:
    """Return the options that a command line gives; what it leaves out is as by default."""
    from fhe_fx.options import Options

    if p_error is None:
        return Options(n_bits=n_bits, seed=seed)
    return Options(n_bits=n_bits, seed=seed, p_error=p_error)


def passphrase_of(file: Path | None) -> str | None:
    """Return what a file holds, if one is given.

    Raises:
        OptionsError: if it holds nothing.
    """
    if file is None:
        return None
    if not (text := file.read_text(encoding="utf-8").strip()):
        raise OptionsError(f"{file} holds no passphrase.")
    return text

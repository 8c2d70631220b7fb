"""The options that commands share, and what their words mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fhe_fx.errors import OptionsError

if TYPE_CHECKING:
    from fhe_fx.options import Options

__all__ = [
    "AsJson",
    "Calibration",
    "ClearInputs",
    "Heads",
    "Lengths",
    "MaxCost",
    "MaxError",
    "Model",
    "NBits",
    "PError",
    "Passes",
    "PassphraseFile",
    "Rules",
    "Seed",
    "Submodules",
    "TargetAgreement",
    "Tokens",
    "budget_of",
    "check_places",
    "head_numbers",
    "lengths_of",
    "options_of",
    "parts_of",
    "passphrase_of",
]

Submodules = Annotated[
    list[str] | None,
    typer.Option(
        "--submodule",
        help='Part to encrypt: a path, a unique suffix, a glob or re:...; once for each. "" is the '
        "model itself, of which the client embeds.",
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
    typer.Option(
        help="Sentences, one a line; a .npy of inputs; a .npz, an array [n, ...] for each argument "
        "of the model. Else the model writes its own."
    ),
]
ClearInputs = Annotated[
    list[str] | None,
    typer.Option(
        "--clear-input",
        help="Argument of the part that the server may see, such as attention_mask; once for each. "
        "Models of transformers then make their masks as eager attention does.",
    ),
]
PError = Annotated[
    float | None, typer.Option(help="Probability that a look-up reads the neighbouring entry.")
]
MaxError = Annotated[
    float | None,
    typer.Option(help="Error that look-ups may make, in parts of the results' deviation."),
]
MaxCost = Annotated[
    float | None, typer.Option(help="Complexity that a circuit may have; then the least error.")
]
TargetAgreement = Annotated[
    float | None,
    typer.Option(help="How often the model shall predict what it does in float, as 0.97."),
]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", help="Bits of some look-ups: PATTERN=BITS, as exp=8. May be repeated."),
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
        help="A Hugging Face directory or hub name, smollm2, random:gpt2, a .pt2 or an .onnx file."
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


def parts_of(submodules: list[str] | None) -> list[str]:
    """Return what `--submodule` names.

    Raises:
        OptionsError: if it is left out.
    """
    if not submodules:
        raise OptionsError("Give the part to encrypt: --submodule h.0.attn")
    return submodules


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


def budget_of(
    p_error: float | None,
    max_error: float | None,
    max_cost: float | None,
    target_agreement: float | None,
    rules: list[str] | None,
) -> dict[str, Any]:
    """Return the options that say how exact look-ups are.

    Raises:
        OptionsError: if a rule is not a pattern and a width.
    """
    return {
        "p_error": p_error,
        "max_error": max_error,
        "max_cost": max_cost,
        "target_agreement": target_agreement,
        "rules": tuple(_rule(text) for text in rules or []),
    }


def _rule(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdecimal():
        raise OptionsError(f"--rule {text!r} is not a pattern and a width. Try --rule exp=8.")
    return pattern, int(bits)


def check_places(**places: Path | None) -> None:
    """Check, before any work, that files can be written where options say.

    Raises:
        OptionsError: names an option and the directory that there is not.
    """
    for option, place in places.items():
        if place is not None and not place.parent.is_dir():
            raise OptionsError(f"--{option} {place}: there is no directory {place.parent}.")
        if place is not None and place.is_dir():
            raise OptionsError(f"--{option} {place} is a directory; name a file in it.")


def options_of(n_bits: int, seed: int, budget: Mapping[str, Any]) -> Options:
    """Return the options that a command line gives; what it leaves out is as by default."""
    from fhe_fx.options import Options

    return Options(n_bits=n_bits, seed=seed, **budget)


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

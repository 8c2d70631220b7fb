"""Reads the words of `fhe-fx evaluate`: ranges of bits, and modes."""

from __future__ import annotations

import re

from fhe_fx.errors import OptionsError, did_you_mean
from fhe_fx.options import Options

__all__ = ["parse_bits", "parse_modes"]

_STAGE_OF = {"fake": "fake_quantized", "clear": "clear", "simulate": "simulated"}


def parse_bits(text: str) -> list[int]:
    """Read `4`, `2,4,6` or `2..8`.

    Raises:
        OptionsError: if it is none of these, a range runs backwards, or a number is absurd.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,99})\s*(?:\.\.\s*(\d{1,99})\s*)?", part)
        if match is None:
            raise OptionsError(
                f"--n-bits {text!r} is not a number, a list or a range. Write 4, 2,4,6 or 2..8."
            )
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise OptionsError(f"--n-bits {part.strip()} runs backwards. Write {high}..{low}.")
        for bits in (low, high):
            Options(n_bits=bits)  # refuses absurd ones
        found += range(low, high + 1)
    return list(dict.fromkeys(found))


def parse_modes(text: str) -> list[str]:
    """Read `fake`, `clear`, `simulate`, or a list of these, and return stages.

    Raises:
        OptionsError: if a mode is none of these.
    """
    modes = [m.strip() for m in text.split(",")]
    for mode in modes:
        if mode not in _STAGE_OF:
            raise OptionsError(
                f"--modes {mode!r} is not one of {', '.join(_STAGE_OF)}."
                f"{did_you_mean(mode, list(_STAGE_OF))}"
            )
    return [stage for mode, stage in _STAGE_OF.items() if mode in modes]

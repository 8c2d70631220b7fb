"""What `fhe-fx evaluate` does with its words, apart from printing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fhe_fx.capture import resolve_targets
from fhe_fx.errors import OptionsError, did_you_mean
from fhe_fx.evaluate.results import Evaluation
from fhe_fx.evaluate.run import evaluate_submodule
from fhe_fx.evaluate.texts import read_texts
from fhe_fx.export.models import ModelError, NamedModel, load_calibration, load_model
from fhe_fx.options import Options

__all__ = ["Command", "parse_bits", "parse_modes", "prepare"]

_STAGE_OF = {"clear": "clear", "simulate": "simulated"}


def parse_bits(text: str) -> list[int]:
    """Read `4`, `2,4,6` or `2..8`.

    Raises:
        OptionsError: if it is none of these, a range runs backwards, or a number is absurd.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:\.\.\s*(\d{1,9})\s*)?", part)
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
    """Read `clear`, `simulate` or both, and return stages.

    Raises:
        OptionsError: if a mode is neither.
    """
    modes = [m.strip() for m in text.split(",")]
    for mode in modes:
        if mode not in _STAGE_OF:
            raise OptionsError(
                f"--modes {mode!r} is not one of {', '.join(_STAGE_OF)}."
                f"{did_you_mean(mode, list(_STAGE_OF))}"
            )
    return [stage for mode, stage in _STAGE_OF.items() if mode in modes]


@dataclass(frozen=True)
class Command:
    """A loaded model, and what to evaluate of it."""

    named: NamedModel
    name: str
    target: list[str]
    n_bits: Sequence[int]
    tokens: int
    heads: Sequence[int] | None
    options: Options

    def __call__(
        self,
        data: Path | None,
        long: str,
        sentences: int,
        calibration: Path | None,
        stages: Sequence[str],
        out: Path,
        on_progress: Callable[[str], None],
    ) -> Evaluation:
        """Read the files, then evaluate."""
        assert self.named.module is not None
        texts = None
        if data is not None:
            texts = read_texts(data, self.named.tokenizer(), self.tokens, long)
        inputs = None
        if calibration is not None:
            inputs = load_calibration(calibration, self.named)
        return evaluate_submodule(
            self.named.module,
            self.target,
            n_bits=self.n_bits,
            tokens=self.tokens,
            heads=self.heads,
            data=texts,
            sentences=sentences,
            calibration=inputs,
            stages=stages,
            options=self.options,
            out=out,
            name=self.name,
            on_progress=on_progress,
        )


def prepare(
    model: str,
    submodule: str,
    n_bits: Sequence[int],
    tokens: int,
    heads: Sequence[int] | None,
    options: Options,
) -> Command:
    """Load a model and find the parts to encrypt.

    Raises:
        ModelError: if there is no such model, or it is an exported program.
        TargetError: if there is no such submodule.
    """
    named = load_model(model, options.seed)
    if named.module is None:
        raise ModelError(
            f"{model} is an exported program of one shape and has no language head to compare by. "
            f"Evaluate the model that it was exported from."
        )
    target = resolve_targets(named.module, submodule)
    return Command(named, model, target, n_bits, tokens, heads, options)

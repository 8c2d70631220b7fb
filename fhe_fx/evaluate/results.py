"""What an evaluation found, as data, and its files: JSON a setting, JSON and CSV of the whole."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fhe_fx.errors import InputError
from fhe_fx.evaluate.metrics import METRICS, Estimate

__all__ = [
    "Evaluation",
    "SettingResult",
    "StageResult",
    "card_figures",
    "load_setting",
    "write_text",
]


@dataclass(frozen=True)
class StageResult:
    """One setting at one stage."""

    stage: str
    """`float`, or one of `fhe_fx.evaluate.STAGES`."""
    metrics: Mapping[str, Estimate]
    """By the names of `METRICS`."""
    seconds: float = 0.0
    """How long it took."""


@dataclass(frozen=True)
class SettingResult:
    """One number of bits at every stage."""

    n_bits: int
    """As given to `encrypt_submodule`."""
    look_ups: int
    """Bootstraps of one run of all encrypted parts."""
    max_lookup_bits: int
    """Input bits of the widest look-up."""
    stages: tuple[StageResult, ...]
    """In the order of the way to ciphertext."""
    warnings: tuple[str, ...] = ()
    """What speaks against trusting the figures."""
    ranges: tuple[Mapping[str, Any], ...] = ()
    """The inputs of look-ups that were outside their range, the most frequent first."""
    lower_seconds: float = 0.0
    """How long lowering took."""
    complexity: float | None = None
    """Of one run of all encrypted parts, as predicted before compiling; None in files of old."""

    def stage(self, name: str) -> StageResult:
        """Return one stage.

        Raises:
            KeyError: if it was not evaluated.
        """
        for stage in self.stages:
            if stage.stage == name:
                return stage
        raise KeyError(name)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model with encrypted parts, by setting and stage."""

    model: str
    """Its name, or its class."""
    targets: tuple[str, ...]
    """Paths of the encrypted submodules; "" is the model itself."""
    heads: tuple[int, ...] | None
    """The heads that are encrypted; None for the whole submodule."""
    tokens: int
    """Rows of the circuit."""
    sentences: int
    positions: int
    """Predictions that were compared."""
    data: str
    """Where the sentences come from."""
    calibration: str
    """Where the calibration texts come from."""
    float_stage: StageResult
    """The float model, on the same sentences."""
    settings: tuple[SettingResult, ...]
    machine: str
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    """What was done to make the texts fit, and what could not be measured."""
    warnings: tuple[str, ...] = field(default_factory=tuple)
    """What speaks against trusting all settings alike."""

    @property
    def parts(self) -> str:
        """What is encrypted, in words."""
        return ", ".join(self.targets) or "as a whole"

    def all_warnings(self) -> list[str]:
        """Return the warnings of all settings, each naming its setting."""
        own = [f"n_bits={s.n_bits}: {text}" for s in self.settings for text in s.warnings]
        return [*self.warnings, *own]

    def table(self) -> str:
        """Return the figures as text, one line a setting and stage."""
        heads = "" if self.heads is None else f" heads {','.join(map(str, self.heads))}"
        perplexity = self.float_stage.metrics.get("perplexity")
        texts = f"{self.sentences} sentences, {self.positions} positions ({self.data})"
        columns = (
            f"{'n_bits':>6}  {'stage':<14}  {'top-1 [95 %]':<22}  {'top-5':>6}  {'top-10':>6}  "
            f"{'perplexity':>10}  {'KL':>8}  {'error':>6}  {'look-ups':>8}"
        )
        lines = [
            f"{self.model} {self.parts}{heads}, {self.tokens} tokens",
            f"{texts}; perplexity in float {perplexity or 'unknown'}",
            columns,
        ]
        for setting in self.settings:
            lines += [_line(setting, stage) for stage in setting.stages]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dataclasses.asdict(self)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over one flat row a setting and stage, intervals included."""
        for setting in self.settings:
            for stage in (self.float_stage, *setting.stages):
                row: dict[str, Any] = {"n_bits": setting.n_bits, "stage": stage.stage}
                for name in METRICS:
                    estimate = stage.metrics.get(name, Estimate(float("nan")))
                    row |= {
                        name: estimate.value,
                        f"{name}_low": estimate.low,
                        f"{name}_high": estimate.high,
                    }
                yield row | {
                    "look_ups": setting.look_ups,
                    "max_lookup_bits": setting.max_lookup_bits,
                    "sentences": self.sentences,
                    "positions": self.positions,
                }

    def csv(self) -> str:
        """Return the rows as CSV."""
        rows = list(self.rows())
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def write(self, directory: Path) -> list[Path]:
        """Write `evaluation.json` and `evaluation.csv`, and return their paths."""
        files = {
            directory / "evaluation.json": json.dumps(self.as_dict(), indent=2) + "\n",
            directory / "evaluation.csv": self.csv(),
        }
        for path, content in files.items():
            write_text(path, content)
        return list(files)


def card_figures(path: Path, n_bits: int) -> dict[str, float]:
    """Read from an evaluation.json what a model card says about accuracy.

    Args:
        path: written by `Evaluation.write`.
        n_bits: the setting.

    Returns:
        How often the most likely next token is the float model's, by stage.

    Raises:
        InputError: if the file cannot be read, or holds no such setting.
    """
    try:
        found = json.loads(path.read_bytes())
        settings = {int(s["n_bits"]): s for s in found["settings"]}
        stages = settings[n_bits]["stages"] if n_bits in settings else None
        text = f"on {int(found['sentences'])} sentences"
        figures = {
            f"same next token as in float, {s['stage']}, {text}": float(
                s["metrics"]["top1"]["value"]
            )
            for s in stages or []
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read as an evaluation ({type(error).__name__}: {error}). Make one "
            f"with: fhe-fx evaluate MODEL --submodule ... --out DIR"
        ) from error
    if not figures:
        known = ", ".join(map(str, sorted(settings)))
        raise InputError(f"{path} holds no setting of {n_bits} bits; it holds: {known}.")
    return figures


def _line(setting: SettingResult, stage: StageResult) -> str:
    def value(name: str) -> float:
        return stage.metrics[name].value if name in stage.metrics else float("nan")

    top = stage.metrics["top1"]
    interval = "" if top.low is None or top.high is None else f" [{top.low:.1%}, {top.high:.1%}]"
    return (
        f"{setting.n_bits:>6}  {stage.stage:<14}  {f'{top.value:.1%}{interval}':<22}  "
        f"{value('top5'):>6.1%}  {value('top10'):>6.1%}  {value('perplexity'):>10.4g}  "
        f"{value('kl'):>8.2g}  {value('relative_error'):>6.3f}  {setting.look_ups:>8,}"
    )


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load_setting(path: Path) -> SettingResult | None:
    """Read what an earlier evaluation finished; None if there is nothing that can be read."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        stages = tuple(
            StageResult(
                str(s["stage"]),
                {str(k): Estimate(**v) for k, v in s["metrics"].items()},
                float(s["seconds"]),
            )
            for s in held.pop("stages")
        )
        for name in ("warnings", "ranges"):
            held[name] = tuple(held[name])
        return SettingResult(stages=stages, **held)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None

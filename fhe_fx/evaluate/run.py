"""Accuracy of a model whose parts are encrypted, setting by setting and stage by stage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fhe_fx.api import encrypt_submodule, encrypted_modules
from fhe_fx.capture import resolve_targets
from fhe_fx.capture.digest import digest_of_code, digest_of_model
from fhe_fx.errors import OptionsError, PassError, did_you_mean
from fhe_fx.evaluate.compare import FloatRun, batches, next_logits, outputs_of
from fhe_fx.evaluate.metrics import Tally
from fhe_fx.evaluate.results import Evaluation, SettingResult, StageResult, load_setting, write_text
from fhe_fx.evaluate.stages import (
    STAGES,
    Clear,
    FakeQuantized,
    Simulated,
)
from fhe_fx.evaluate.texts import (
    DataError,
    Texts,
    digest_of_rows,
    overlap,
    sample_texts,
)
from fhe_fx.options import Options
from fhe_fx.passes import Pipeline
from fhe_fx.quant.calibration import as_call
from fhe_fx.report import report_on
from fhe_fx.report.machine import installed_version, machine_name
from fhe_fx.runtime.ranges import RangeUse, range_warnings
from fhe_fx.runtime.region import Region
from fhe_fx.runtime.staged import StagedRegion

__all__ = ["evaluate_submodule"]

EXCESS = 1.5
"""Distance of simulated from clear results, in units of what noise explains, from which an
evaluation warns."""
_CALIBRATION_TEXTS = 128
"""Texts that the model writes for calibration, of four times the circuit's length or as long as its
positions allow."""

Progress = Callable[[str], None]


def evaluate_submodule(
    model: nn.Module,
    target: str | Sequence[str],
    *,
    n_bits: int | Sequence[int] = 4,
    tokens: int = 8,
    heads: Sequence[int] | None = None,
    clear_inputs: str | Sequence[str] = (),
    data: Texts | None = None,
    sentences: int = 80,
    calibration: Iterable[Any] | None = None,
    stages: Sequence[str] = STAGES,
    options: Options | None = None,
    passes: Pipeline | None = None,
    out: Path | None = None,
    name: str | None = None,
    on_progress: Progress = lambda text: None,
) -> Evaluation:
    """Measure how well a language model predicts when a part of it runs on integers, and noise.

    The float model runs once. Each setting is lowered once and emulated on all sentences together;
    nothing is compiled. With `out`, a setting that an earlier call finished is read from there.

    Args:
        model: a causal language model; it is left as it is.
        target: as in `fhe_fx.encrypt_submodule`.
        n_bits: one setting, or several.
        tokens: rows of the circuit.
        heads: as in `fhe_fx.encrypt_submodule`.
        clear_inputs: likewise.
        data: sentences; by default the model writes them, from another seed than calibration's.
        sentences: how many the model writes.
        calibration: model inputs; by default texts that the model writes.
        stages: some of `STAGES`.
        options: all other choices; `n_bits` above wins.
        passes: a pipeline in place of the default one.
        out: directory of results, made if it is missing.
        name: what to call the model in results.
        on_progress: is told what is being done.

    Raises:
        DataError: if the sentences do not fit.
        OptionsError: if a stage does not exist, a number is outside its domain, or `out` cannot be
            made.
        FheFxError: whatever `encrypt_submodule` raises.
    """
    options = options or Options()
    bits = (n_bits,) if isinstance(n_bits, int) else tuple(dict.fromkeys(n_bits))
    settings = [dataclasses.replace(options, n_bits=b) for b in bits]
    _check(settings, stages, tokens, sentences)
    paths = resolve_targets(model, target)
    own = _OwnTexts(model, tokens, options.seed, on_progress)
    data = data or own.sentences(sentences)
    _check_data(data, tokens)
    _make_directory(out)
    inputs = own.calibration() if calibration is None else list(calibration)
    known = [row for call in inputs for row in _token_rows(call)]
    on_progress(f"running the float model on {len(data.rows)} sentences")
    expected = FloatRun(model, paths, batches(data.rows))
    run = _Run(model, paths, heads, clear_inputs, tokens, inputs, stages, passes, expected)
    fixed = {
        "code": digest_of_code(),
        "model": own.digest,
        "targets": paths,
        "heads": heads,
        "clear_inputs": clear_inputs,
        "tokens": tokens,
        "passes": repr(passes),
        "data": digest_of_rows(data.rows),
        "calibration": digest_of_rows([t for c in inputs for t in as_call(c).tensors()]),
        "stages": list(stages),
    }
    found: list[SettingResult] = []
    times: list[float] = []
    for number, setting in enumerate(settings, 1):
        place = None if out is None else _place(out, fixed | {"options": repr(setting)})
        at = f"n_bits={setting.n_bits}, {number} of {len(settings)}{_left(times, settings, number)}"
        start = time.perf_counter()
        evaluate = partial(run.setting, setting, _after(at, on_progress))
        found.append(_kept(place, evaluate))
        times.append(time.perf_counter() - start)
    return Evaluation(
        model=name or type(model).__name__,
        targets=tuple(paths),
        heads=None if heads is None else tuple(heads),
        tokens=tokens,
        sentences=len(data.rows),
        positions=sum(len(row) for row in data.rows),
        data=data.origin,
        calibration=own.said if calibration is None else "given inputs",
        float_stage=expected.stage(),
        settings=tuple(found),
        machine=machine_name(),
        versions={p: installed_version(p) for p in ("fhe_fx", "torch", "transformers")},
        notes=data.notes,
        warnings=tuple(_overlap_warnings(data.rows, known)),
    )


@dataclass
class _OwnTexts:
    """What the model writes where texts are not given."""

    model: nn.Module
    tokens: int
    seed: int
    on_progress: Progress

    def __post_init__(self) -> None:
        self.digest = digest_of_model(self.model)
        room = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        most = room - 1 if isinstance(room, int) else 4 * self.tokens
        self.length = max(self.tokens, min(4 * self.tokens, most))
        self.said = f"{_CALIBRATION_TEXTS} texts of {self.length} tokens, the model's own"

    def _sample(self, n: int, tokens: int, seed: int) -> list[Tensor]:
        return sample_texts(
            self.model, n, tokens, seed, digest=self.digest, on_progress=self.on_progress
        )

    def sentences(self, n: int) -> Texts:
        """Return texts to evaluate on, from a seed of their own."""
        rows = self._sample(n, self.tokens, self.seed + 1)
        return Texts(tuple(rows), "the model's own, sampled")

    def calibration(self) -> list[Any]:
        """Return model inputs."""
        rows = self._sample(_CALIBRATION_TEXTS, self.length, self.seed)
        return [{"input_ids": row[None]} for row in rows]


def _place(out: Path, key: dict[str, Any]) -> Path:
    """Return the file of one setting, named by all that its figures depend on."""
    text = json.dumps(key, sort_keys=True)
    return out / "settings" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _kept(place: Path | None, evaluate: Callable[[], SettingResult]) -> SettingResult:
    """Read a setting that is finished, or evaluate it and write it down."""
    if place is not None and (known := load_setting(place)) is not None:
        return known
    result = evaluate()
    if place is not None:
        write_text(place, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return result


def _left(times: Sequence[float], settings: Sequence[Options], number: int) -> str:
    """Say how long the rest will take, going by the slowest setting: wider look-ups take longer."""
    if not times or max(times) < 1:
        return ""
    return f", about {max(times) * (len(settings) - number + 1):.0f} s left"


def _after(prefix: str, on_progress: Progress) -> Progress:
    return lambda text: on_progress(f"{prefix}: {text}")


def _overlap_warnings(rows: Sequence[Tensor], calibration: Sequence[Tensor]) -> list[str]:
    shared = overlap(rows, calibration)
    if shared == 0:
        return []
    said = f"{shared:.0%} of the sentences stand in the calibration texts, so ranges were made"
    return [f"{said} for them. Use other texts for one of the two."]


def _check(settings: Sequence[Options], stages: Sequence[str], tokens: int, sentences: int) -> None:
    for stage in stages:
        if stage not in STAGES:
            raise OptionsError(
                f"There is no stage {stage!r}; there are {', '.join(STAGES)}."
                f"{did_you_mean(stage, list(STAGES))}"
            )
    for what, value, least in (("tokens", tokens, 1), ("sentences", sentences, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionsError(f"{what}={value!r} is not a positive integer.")
    if not settings or not stages:
        raise OptionsError("Give at least one n_bits and one stage.")


def _check_data(data: Texts, tokens: int) -> None:
    if not data.rows:
        raise DataError("There are no sentences to evaluate on.")
    longest = max(len(row) for row in data.rows)
    if longest > tokens:
        raise DataError(f"A sentence has {longest} tokens; the circuit takes {tokens}. Cut it.")


def _make_directory(out: Path | None) -> None:
    """Make the directory of results before minutes of work, not after."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionsError(
            f"{out} is no directory, and cannot be made one: {error.strerror}. "
            f"Give another one for results."
        ) from error


def _token_rows(call: Any) -> list[Tensor]:
    """Return the texts of a calibration input, without masks."""
    given = as_call(call)
    named = given.kwargs.get("input_ids")
    tensors = [t for t in given.tensors() if not t.is_floating_point()]
    ids = named if isinstance(named, Tensor) else next(iter(tensors), None)
    return [] if ids is None else list(ids.reshape(-1, ids.shape[-1]))


@dataclass
class _Run:
    """Evaluates one setting after the other."""

    model: nn.Module
    paths: list[str]
    heads: Sequence[int] | None
    clear_inputs: str | Sequence[str]
    tokens: int
    calibration: list[Any]
    stages: Sequence[str]
    passes: Pipeline | None
    expected: FloatRun

    def setting(self, options: Options, on_progress: Progress) -> SettingResult:
        """Lower the target, and run it at every stage."""
        on_progress("lowering")
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            encrypted = encrypt_submodule(
                self.model,
                self.paths,
                max_tokens=self.tokens,
                heads=self.heads,
                clear_inputs=self.clear_inputs,
                calibration=self.calibration,
                options=options,
                passes=self.passes,
            )
        seconds = time.perf_counter() - start
        modules = encrypted_modules(encrypted)
        regions = [m.region for m in modules]
        costs = report_on([(r.program, None) for r in regions]).regions
        warned = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        ranges: list[RangeUse] = []
        results = []
        for stage in (s for s in STAGES if s in self.stages):
            on_progress(f"preparing stage {stage}")
            try:
                runners = [_runner(stage, r, options.seed + i) for i, r in enumerate(regions)]
            except PassError as error:
                warned.append(f"There is no stage {stage}: {error}")
                continue
            for module, region, runner in zip(modules, regions, runners, strict=True):
                module.region = StagedRegion.of(region, runner)
                module.mode = "clear"
            results.append(self._stage(encrypted, stage, on_progress))
            for runner in runners:
                if isinstance(runner, Clear):
                    ranges += runner.ranges.values()
                elif isinstance(runner, Simulated) and runner.excess > EXCESS:
                    warned.append(_excess_warning(runner))
        exceeded = sorted((r for r in ranges if r.outside), key=lambda r: -r.share)
        warned += range_warnings(ranges)
        return SettingResult(
            n_bits=options.n_bits,
            look_ups=sum(c.look_ups for c in costs),
            max_lookup_bits=max(c.max_lookup_bits for c in costs),
            stages=tuple(results),
            warnings=tuple(dict.fromkeys(warned)),
            ranges=tuple({"where": r.where, "share": r.share} for r in exceeded[:20]),
            lower_seconds=round(seconds, 1),
            complexity=sum(c.predicted_complexity or 0.0 for c in costs),
        )

    def _stage(self, encrypted: nn.Module, stage: str, on_progress: Progress) -> StageResult:
        start = time.perf_counter()
        tally = Tally()
        texts = self.expected.batches
        with torch.no_grad(), outputs_of(encrypted, self.paths) as found:
            for number, ids in enumerate(texts):
                on_progress(f"{stage}, batch {number + 1} of {len(texts)}")
                logits = next_logits(encrypted, ids)
                self.expected.add(tally, number, logits, found)
        return StageResult(stage, tally.estimates(), round(time.perf_counter() - start, 1))


def _runner(stage: str, region: Region, seed: int) -> FakeQuantized | Clear | Simulated:
    if stage == "fake_quantized":
        return FakeQuantized(region)
    return Clear(region.program) if stage == "clear" else Simulated(region.program, seed)


def _excess_warning(runner: Simulated) -> str:
    return (
        f"{runner.program.name}: simulated results are {runner.excess:.1f} times as far from the "
        f"clear ones as noise explains; noise pushes values past the ends of their ranges, where "
        f"tables wrap. Calibrate on more, or more varied, text."
    )

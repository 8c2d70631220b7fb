"""Measures how well models predict with encrypted attention, and what each means adds to that.

    python benchmarks/quality.py               # settings: models, layers, bits
    python benchmarks/quality.py --ablation    # one means after the other switched off

Prints a Markdown table, a row as it is measured. Sentences are not those of calibration: those of
the shipped GPT-2 are its held-out file, the pretrained decoder writes both itself, from different
seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

import fhe_fx
from fhe_fx.evaluate import Evaluation, evaluate_submodule, read_texts
from fhe_fx.export.models import load_model
from fhe_fx.passes import default_pipeline
from fhe_fx.passes.base import Pass, Pipeline
from fhe_fx.report.machine import machine_name

SHIPPED = Path(__file__).parent.parent / "examples" / "gpt2" / "model"
DECODER = "model.layers.{}.self_attn"
TOKENS = 6


@dataclass(frozen=True)
class Setting:
    """What is encrypted, and how."""

    model: str
    target: str
    n_bits: int = 4
    heads: tuple[int, ...] | None = None
    sentences: int = 200
    max_error: float | None = None


def settings() -> Iterator[Setting]:
    """List the rows of the first table."""
    shipped = str(SHIPPED)
    yield Setting(shipped, "h.0.attn", 4, (0,))
    yield Setting(shipped, "h.0.attn", 4, (0,), max_error=0.04)
    for n_bits in (3, 4, 5, 6):
        yield Setting(shipped, "h.0.attn", n_bits)
    yield Setting(shipped, "h.1.attn", 4)
    yield Setting(shipped, "h.3.attn", 4)
    for n_bits in (4, 5, 6):
        yield Setting(shipped, "h.*.attn", n_bits)
    yield Setting("smollm2", DECODER.format(0), 4, (0,))
    yield Setting("smollm2", DECODER.format(0), 4, (0,), max_error=0.1)
    for n_bits in (3, 4, 5, 6):
        yield Setting("smollm2", DECODER.format(0), n_bits)
    yield Setting("smollm2", DECODER.format(15), 4)
    yield Setting("smollm2", DECODER.format(29), 4)


def without(name: str, **fields: Any) -> Pipeline:
    """Return the usual pipeline with other fields of one pass."""
    pipeline = default_pipeline()
    changed: list[Pass] = [
        dataclasses.replace(p, **fields) if p.name == name else p for p in pipeline
    ]
    return Pipeline(tuple(changed))


def ablations() -> dict[str, tuple[fhe_fx.Options, Pipeline | None]]:
    """List what is switched off, by what the table calls it."""
    usual = fhe_fx.Options()
    no_search = without("choose-ranges", rooms=(0.0,))
    return {
        "nothing": (usual, None),
        "widths allotted with p_error (6 bits at 0.1)": (
            dataclasses.replace(usual, p_error=0.1), None,
        ),
        "several readings": (usual, without("allot-bits", most_readings=1)),
        "channels by what they save": (usual, without("choose-bases", exchange=0.0)),
        "few channels of values": (usual, default_pipeline().drop("reduce-channels")),
        "inputs of 12 bits (8)": (dataclasses.replace(usual, input_bits=8), None),
        "weights rounded for their sums": (
            usual, without("lower-to-integers", corrects_sums=False),
        ),
        "tables of means over a slot": (
            usual, without("lower-to-integers", averages_slots=False),
        ),
        "ranges of least error (the calibrated ends)": (usual, no_search),
        "squares around the mean": (usual, without("products-to-squares", centres=False)),
        "rotated channels": (usual, without("choose-bases", rotates=False)),
        "limits of factors": (usual, default_pipeline().drop("limit-factors")),
    }  # fmt: skip


def evaluated(
    setting: Setting, options: fhe_fx.Options | None = None, passes: Pipeline | None = None
) -> Evaluation:
    """Measure one row."""
    named = load_model(setting.model)
    assert named.module is not None
    texts: dict[str, Any] = {}
    if setting.max_error is not None:
        options = dataclasses.replace(
            options or fhe_fx.Options(), n_bits=setting.n_bits, max_error=setting.max_error
        )
    if setting.model == str(SHIPPED):
        tokenizer = named.tokenizer()
        texts["data"] = read_texts(SHIPPED / "heldout.txt", tokenizer, TOKENS)
        texts["calibration"] = [
            row[None] for row in read_texts(SHIPPED / "calibration.txt", tokenizer, 20).rows
        ]
    return evaluate_submodule(
        named.module, setting.target, n_bits=setting.n_bits, heads=setting.heads, tokens=TOKENS,
        sentences=setting.sentences, stages=("clear", "simulated"), options=options, passes=passes,
        **texts,
    )  # fmt: skip


def figures(found: Evaluation) -> str:
    """Return the cells of a row."""
    (setting,) = found.settings
    cells = [f"{setting.look_ups:,}", str(found.positions)]
    for name in ("clear", "simulated"):
        metrics = setting.stage(name).metrics
        top1, error = metrics["top1"], metrics["relative_error"]
        low, high = (f"{100 * (x or 0):.1f}" for x in (top1.low, top1.high))
        cells += [f"{100 * top1.value:.1f} % [{low}, {high}]", f"{error.value:.3f}"]
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ablation", action="store_true")
    logging.disable_progress_bar()
    is_ablation = parser.parse_args().ablation
    print(f"{machine_name()}; {TOKENS} tokens\n")
    columns = "look-ups | positions | top-1, clear | error | top-1, simulated | error"
    first = "without" if is_ablation else "model | part | n_bits"
    print(f"| {first} | {columns} |")
    print("|---" * (f"{first} | {columns}".count("|") + 1) + "|")
    if is_ablation:
        setting = Setting(str(SHIPPED), "h.0.attn", 4)
        for name, (options, passes) in ablations().items():
            print(f"| {name} | {figures(evaluated(setting, options, passes))} |", flush=True)
        return
    for setting in settings():
        model = "shipped GPT-2" if setting.model == str(SHIPPED) else "SmolLM2-135M"
        heads = "" if setting.heads is None else f", head {setting.heads[0]}"
        budget = "" if setting.max_error is None else f", max_error={setting.max_error:g}"
        row = f"{model} | {setting.target}{heads} | {setting.n_bits}{budget}"
        print(f"| {row} | {figures(evaluated(setting))} |", flush=True)


if __name__ == "__main__":
    main()

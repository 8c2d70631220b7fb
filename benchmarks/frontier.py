"""Measures accuracy against cost: one head and the whole attention, at one budget after the other.

    python benchmarks/frontier.py --out docs/frontier    # .json, .png and .svg

Cost is that of attention of GPT-2's size with random weights, as the published use case has it: one
head at 6 tokens, 12 heads at 8. Accuracy is that of the very same options on the first attention of
a pretrained decoder, SmolLM2-135M, on text that it writes itself and that calibration has not seen:
how often the most likely next token stays the same, with the noise of look-ups. What the options
cost there (9 heads of 64, 576 channels) is drawn as well: of trained weights few channels matter,
of random ones all. A row that stands in the JSON file already is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fhe_fx
from fhe_fx.evaluate import evaluate_submodule
from fhe_fx.export.models import load_model
from fhe_fx.report.machine import machine_name

PARTS: dict[str, dict[str, Any]] = {
    "one head, 6 tokens": {"heads": [0], "tokens": 6, "sentences": 200},
    "12 heads, 8 tokens": {"heads": None, "tokens": 8, "sentences": 80},
}
BUDGETS: dict[str, tuple[float | None, ...]] = {
    "one head, 6 tokens": (0.2, 0.17, 0.15, 0.13, None, 0.08, 0.04),
    "12 heads, 8 tokens": (0.15, None, 0.07, 0.055, 0.045),
}
PUBLISHED = {"one head, 6 tokens": (3.6e12, 0.959), "12 heads, 8 tokens": (9.2e13, 0.345)}
WANTED = {"one head, 6 tokens": (1.0e11, 0.97), "12 heads, 8 tokens": (2.4e12, 0.95)}


def main() -> None:
    """Measure what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("frontier"))
    out = parser.parse_args().out
    data = out.with_suffix(".json")
    rows = json.loads(data.read_text())["rows"] if data.exists() else []
    for part, budgets in BUDGETS.items():
        for budget in budgets:
            if not any(r["part"] == part and r["max_error"] == budget for r in rows):
                rows.append(measured(part, budget))
                print(json.dumps(rows[-1]), flush=True)
                found = {"machine": machine_name(), "rows": rows}
                data.write_text(json.dumps(found, indent=2) + "\n")
    draw(rows, out)


def measured(part: str, max_error: float | None) -> dict[str, Any]:
    """Measure one point; `max_error=None` is the default budget, n_bits=4."""
    choices, options = PARTS[part], fhe_fx.Options(max_error=max_error)
    sized, decoder = load_model("random:gpt2").module, load_model("smollm2").module
    assert sized is not None
    assert decoder is not None
    encrypted = fhe_fx.encrypt_submodule(
        sized, "h.0.attn", heads=choices["heads"], max_tokens=choices["tokens"], options=options
    )
    (cost,) = fhe_fx.report(encrypted, backend="reference").regions
    (setting,) = evaluate_submodule(
        decoder, "model.layers.0.self_attn", heads=choices["heads"], tokens=choices["tokens"],
        sentences=choices["sentences"], stages=("clear", "simulated"), options=options,
    ).settings  # fmt: skip
    row: dict[str, Any] = {
        "part": part, "max_error": max_error, "look_ups": cost.look_ups,
        "complexity": cost.predicted_complexity, "decoder_complexity": setting.complexity,
    }  # fmt: skip
    for stage in ("clear", "simulated"):
        metrics = setting.stage(stage).metrics
        top1 = metrics["top1"]
        row[stage] = {
            "top1": top1.value, "low": top1.low, "high": top1.high,
            "error": metrics["relative_error"].value,
        }  # fmt: skip
    return row


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw agreement against complexity, a panel for each part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PARTS), figsize=(9, 3.6), layout="constrained")
    for axes, part in zip(panels, PARTS, strict=True):
        own = sorted((r for r in rows if r["part"] == part), key=lambda r: r["complexity"])
        costs = [r["complexity"] for r in own]
        for stage, style in (("clear", "--"), ("simulated", "-")):
            values = [100 * r[stage]["top1"] for r in own]
            ends = [[100 * r[stage][end] for r in own] for end in ("low", "high")]
            (line,) = axes.plot(costs, values, style, marker="o", ms=4, label=f"fhe_fx, {stage}")
            axes.fill_between(costs, *ends, alpha=0.15, color=line.get_color(), lw=0)
        trained = sorted(own, key=lambda r: float(r["decoder_complexity"]))
        axes.plot(
            [r["decoder_complexity"] for r in trained],
            [100 * r["simulated"]["top1"] for r in trained],
            ":", marker=".", color="tab:green", label="simulated, cost of the decoder",
        )  # fmt: skip
        cost, top1 = PUBLISHED[part]
        axes.plot(cost, 100 * top1, "s", color="0.4", label="published, 4 bits")
        cost, top1 = WANTED[part]
        axes.plot(cost, 100 * top1, "*", ms=10, color="tab:red", label="wanted")
        axes.set(xscale="log", title=part, xlabel="complexity")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("same next token, %")
    panels[0].legend(loc="lower right", frameon=False, fontsize=8)
    for suffix in (".png", ".svg"):
        figure.savefig(out.with_suffix(suffix), dpi=160)


if __name__ == "__main__":
    main()

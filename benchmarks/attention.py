"""Compiles attention of GPT-2's size with random weights, and prints what it costs.

    python benchmarks/attention.py             # one head at 6 tokens, all heads at 6 and 8
    python benchmarks/attention.py --execute   # besides, one head is run with keys
    python benchmarks/attention.py --decoder   # the first attention of SmolLM2-135M instead;
                                               # with --execute all of it is run, too, at 6 tokens

Look-ups and complexity are exact and do not depend on the machine; seconds and memory do.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from measure import cost_row, fresh_inputs, peak_gigabytes, random_gpt2, region_of

import fhe_fx
from fhe_fx.export.models import load_model
from fhe_fx.report.machine import machine_name

PUBLISHED = {
    # Zama's use case, 4 bits: look-ups and complexity of the same part, compiled with
    # concrete-python 2.11 (docs/design.md, "Beside the published use case").
    ("one head", 6): (11_772, 3.6e12),
    ("12 heads", 8): (269_568, 9.2e13),
}


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoder", action="store_true", help="trained weights: 9 heads of 64")
    parser.add_argument("--max-error", type=float, help="instead of what --n-bits stands for")
    parser.add_argument("--execute", action="store_true", help="run with keys")
    parser.add_argument("--n-bits", type=int, default=4)
    parser.add_argument("--result-bits", type=int, default=fhe_fx.Options.result_bits)
    choices = parser.parse_args()
    decoder = load_model("smollm2").module if choices.decoder else None
    model = random_gpt2() if decoder is None else decoder
    target = "h.0.attn" if decoder is None else "model.layers.0.self_attn"
    every_head = "12 heads" if decoder is None else "9 heads"
    print(
        json.dumps(
            {
                "machine": machine_name(), "part": target,
                "n_bits": choices.n_bits, "max_error": choices.max_error,
            }
        )
    )  # fmt: skip
    options = fhe_fx.Options(
        n_bits=choices.n_bits, max_error=choices.max_error, result_bits=choices.result_bits
    )
    for label, heads, tokens in (
        ("one head", [0], 6),
        (every_head, None, 6),
        (every_head, None, 8),
    ):
        start = time.perf_counter()
        encrypted = fhe_fx.encrypt_submodule(
            model, target, heads=heads, max_tokens=tokens, options=options
        )
        lowered = time.perf_counter() - start
        cost = fhe_fx.compile(encrypted, verbose=False).regions[0]
        row = {
            "part": label, "tokens": tokens, **cost_row(cost),
            "lower_seconds": round(lowered, 1), "peak_gigabytes": peak_gigabytes(),
        }  # fmt: skip
        if decoder is None and (label, tokens) in PUBLISHED and cost.complexity:
            look_ups, complexity = PUBLISHED[label, tokens]
            row["published_look_ups"], row["published_complexity"] = look_ups, complexity
            row["complexity_ratio"] = round(complexity / cost.complexity, 1)
        print(json.dumps(row), flush=True)
        if choices.execute and (heads or (decoder is not None and tokens == 6)):
            print(json.dumps(execute(encrypted, tokens)), flush=True)


def execute(encrypted: torch.nn.Module, tokens: int) -> dict[str, float]:
    """Run a region once with keys on an ordinary input, and once on an unusually large one.

    The second is the most extreme of five times as many inputs as were used for calibration, none
    of them among those, by the largest deviation from the calibrated mean in standard deviations.
    """
    region = region_of(encrypted)
    calibrated = torch.stack([s[0] for s in region.captured.samples])
    fresh = fresh_inputs(encrypted, 5 * len(calibrated), tokens)
    spread = ((fresh - calibrated.mean(0)) / calibrated.std(0)).abs().flatten(1).amax(1)
    row: dict[str, float] = {}
    for name, x in (
        ("ordinary", fresh[int(spread.argmin())]),
        ("rare", fresh[int(spread.argmax())]),
    ):
        expected = region.captured(x)[0]
        size = expected.norm()
        for mode in ("clear", "simulate", "execute"):
            start = time.perf_counter()
            value = region.run_circuit([x], mode)[0]
            row[f"{name}_{mode}_error"] = round(float((value - expected).norm() / size), 3)
        row[f"{name}_execute_seconds"] = round(time.perf_counter() - start, 1)
        errors = (value - expected).flatten(0, -2).norm(dim=-1)
        sizes = expected.flatten(0, -2).norm(dim=-1)
        row[f"{name}_worst_row_error"] = round(float((errors / sizes).max()), 3)
    return row


if __name__ == "__main__":
    main()

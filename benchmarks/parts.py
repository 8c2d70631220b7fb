"""Lowers, compiles and simulates parts of the shipped GPT-2, and prints their error.

    python benchmarks/parts.py

The error is the root mean square difference from the float part over held-out sentences (none of
them seen in training or calibration), relative to the root mean square of the float part.
"""

from __future__ import annotations

import json

from measure import agreement, cost_row, module_error, shipped_gpt2, shipped_sentences

import fhe_fx
from fhe_fx.report.machine import machine_name

TOKENS, SIMULATED = 6, 8
PARTS = (("h.0.attn", 4), ("h.0.mlp", 4), ("h.0", 4), ("h.0.attn", 6), ("h.0.mlp", 6), ("h.0", 5))


def main() -> None:
    """Print one JSON object a line."""
    sentences = len(shipped_sentences("heldout.txt", TOKENS))
    print(json.dumps({"machine": machine_name(), "sentences": sentences, "tokens": TOKENS}))
    for target, n_bits in PARTS:
        print(json.dumps(measured(target, n_bits)), flush=True)


def measured(target: str, n_bits: int) -> dict[str, object]:
    """Return cost and accuracy of a part."""
    heldout = shipped_sentences("heldout.txt", TOKENS)
    encrypted = fhe_fx.encrypt_submodule(
        shipped_gpt2(), target, n_bits=n_bits, max_tokens=TOKENS,
        calibration=shipped_sentences("calibration.txt", TOKENS),
    )  # fmt: skip
    cost = fhe_fx.compile(encrypted, verbose=False).regions[0]
    return {
        "part": target, "tokens": TOKENS, "n_bits": n_bits, **cost_row(cost),
        "clear_error": module_error(encrypted, heldout, "clear"),
        "simulate_error": module_error(encrypted, heldout[:SIMULATED], "simulate"),
        "next_token_agreement": agreement(encrypted, heldout),
    }  # fmt: skip


if __name__ == "__main__":
    main()

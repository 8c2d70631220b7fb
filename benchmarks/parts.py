"""Lowers, compiles and simulates parts of the shipped GPT-2, and prints their error.

    python benchmarks/parts.py

The error is the root mean square difference from the float part over held-out sentences (none of
them seen in training or calibration), relative to the root mean square of the float part.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.report.machine import machine_name

MODEL = Path(__file__).parent.parent / "examples" / "gpt2" / "model"
TOKENS, SIMULATED = 6, 8


def main() -> None:
    """Print one JSON object a line."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def sentences(name: str) -> list[torch.Tensor]:
        lines = (MODEL / name).read_text().splitlines()
        ids = [tokenizer(line, return_tensors="pt")["input_ids"] for line in lines]
        return [i[:, :TOKENS] for i in ids if i.shape[1] >= TOKENS]

    calibration, heldout = sentences("calibration.txt"), sentences("heldout.txt")
    print(json.dumps({"machine": machine_name(), "sentences": len(heldout), "tokens": TOKENS}))
    for target, n_bits in (
        ("h.0.attn", 4), ("h.0.mlp", 4), ("h.0", 4), ("h.0.attn", 6), ("h.0.mlp", 6), ("h.0", 5),
    ):  # fmt: skip
        encrypted = fhe_fx.encrypt_submodule(
            model, target, n_bits=n_bits, max_tokens=TOKENS, calibration=calibration
        )
        cost = fhe_fx.compile(encrypted, verbose=False).regions[0]
        row = {
            "part": target, "n_bits": n_bits, "look_ups": cost.look_ups,
            "complexity": cost.complexity, "max_lookup_bits": cost.max_lookup_bits,
            "compile_seconds": round(cost.compile_seconds or 0, 1),
            "clear_error": error(encrypted, heldout, "clear"),
            "simulate_error": error(encrypted, heldout[:SIMULATED], "simulate"),
            "next_token_agreement": agreement(encrypted, heldout),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


def error(encrypted: torch.nn.Module, inputs: list[torch.Tensor], mode: str) -> float:
    """Return the relative error of the encrypted part's first result."""
    module = encrypted_modules(encrypted)[0]
    outputs: list[torch.Tensor] = []

    def keep(_: object, args: object, output: object) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    hook = module.register_forward_hook(keep)
    results = {}
    with torch.no_grad():
        for name in ("disable", mode):
            fhe_fx.set_mode(encrypted, name)
            outputs.clear()
            for ids in inputs:
                encrypted(ids)
            results[name] = torch.stack(outputs)
    hook.remove()
    difference = (results[mode] - results["disable"]).square().mean().sqrt()
    return round(float(difference / results["disable"].square().mean().sqrt()), 4)


def agreement(encrypted: torch.nn.Module, inputs: list[torch.Tensor]) -> float:
    """Return how often the most likely next token is the float model's, over all positions."""
    best = {}
    with torch.no_grad():
        for mode in ("disable", "clear"):
            fhe_fx.set_mode(encrypted, mode)
            best[mode] = torch.cat([encrypted(ids).logits.argmax(-1) for ids in inputs])
    return round(float((best["clear"] == best["disable"]).float().mean()), 4)


if __name__ == "__main__":
    main()

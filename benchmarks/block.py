"""Encrypts a whole block in one circuit, runs it with keys, and compares errors with the predicted.

    python benchmarks/block.py                        # a LLaMA-style decoder layer
    python benchmarks/block.py --model gpt2           # the first block of the shipped GPT-2
    python benchmarks/block.py --executed 0           # in clear and simulated alone

Norm, attention, residual, norm, MLP, residual. The decoder layer is transformers' own, with random
weights: rotary embedding, grouped-query attention, SwiGLU, RMSNorm. Errors are root mean square
over inputs that calibration had not seen, in parts of the results' deviation. The report predicts
what roundings and noise of look-ups make of them; the bound is twice that, for rounded weights and
results, and for values beyond those of calibration.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from measure import cost_row, region_of, shipped_gpt2, shipped_sentences
from torch import Tensor

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.report.machine import machine_name

CALIBRATION = 128
COMPARED = {"clear": 64, "simulate": 16}


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--channels", type=int, default=32, help="of the decoder layer")
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--n-bits", type=int, default=4)
    parser.add_argument("--executed", type=int, default=2, help="inputs run with keys")
    given = parser.parse_args()
    model, path, calibration, held_out = (
        shipped(given.tokens) if given.model == "gpt2" else llama(given.channels, given.tokens)
    )
    encrypted = fhe_fx.encrypt_submodule(
        model, path, n_bits=given.n_bits, max_tokens=given.tokens, calibration=calibration
    )
    cost = fhe_fx.compile(encrypted, verbose=False).regions[0]
    predicted = cost.predicted_error or 0.0
    part = f"{type(model.get_submodule(path)).__name__} {path}"
    print(json.dumps({
        "machine": machine_name(), "part": part, "tokens": given.tokens, "n_bits": given.n_bits,
        **cost_row(cost), "predicted_error": round(predicted, 3), "bound": round(2 * predicted, 3),
    }))  # fmt: skip
    samples = inputs_of_part(encrypted, held_out)
    for mode, n in {**COMPARED, "execute": given.executed}.items():
        if n:
            row = compared(encrypted, samples[:n], mode)
            row["is_within_bound"] = row["error"] <= 2 * predicted
            print(json.dumps(row), flush=True)


def llama(channels: int, tokens: int) -> tuple[Any, str, list[Tensor], list[Tensor]]:
    """Return a decoder of one layer, its path, and words to calibrate with and to compare on."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=channels, intermediate_size=2 * channels, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=64, max_position_embeddings=16,
        initializer_range=channels**-0.5, pad_token_id=0,
    )  # fmt: skip
    words = torch.randint(1, 64, (CALIBRATION + max(COMPARED.values()), tokens)).split(1)
    calibration, held_out = list(words[:CALIBRATION]), list(words[CALIBRATION:])
    return LlamaModel(config).eval(), "layers.0", calibration, held_out


def shipped(tokens: int) -> tuple[Any, str, list[Tensor], list[Tensor]]:
    """Return the shipped GPT-2, the path of its first block, and sentences."""
    calibration, held_out = (
        shipped_sentences(name, tokens) for name in ("calibration.txt", "heldout.txt")
    )
    return shipped_gpt2(), "transformer.h.0", calibration, held_out


def inputs_of_part(encrypted: torch.nn.Module, inputs: list[Tensor]) -> list[list[Tensor]]:
    """Return what the encrypted part is given when the model runs on inputs."""
    (part,) = encrypted_modules(encrypted)
    found: list[list[Tensor]] = []
    hook = part.register_forward_pre_hook(
        lambda module, args, kwargs: found.extend(module.samples_of(*args, **kwargs)),
        with_kwargs=True,
    )
    with torch.no_grad():
        for words in inputs:
            encrypted(words)
    hook.remove()
    return found


def compared(encrypted: torch.nn.Module, samples: list[list[Tensor]], mode: str) -> dict[str, Any]:
    """Return the error of the first result in a mode."""
    region = region_of(encrypted)
    exact = torch.stack([region.run_float(s)[0] for s in samples])
    start = time.perf_counter()
    found = torch.stack([results[0] for results in region.run_many(samples, mode)])
    seconds = (time.perf_counter() - start) / len(samples)
    of_each = (found - exact).square().flatten(1).mean(1).sqrt() / (exact - exact.mean()).std()
    return {
        "mode": mode, "inputs": len(samples),
        "error": round(float(of_each.square().mean().sqrt()), 3),
        "largest_error": round(float(of_each.max()), 3),
        **({"seconds_each": round(seconds, 1)} if mode == "execute" else {}),
    }  # fmt: skip


if __name__ == "__main__":
    main()

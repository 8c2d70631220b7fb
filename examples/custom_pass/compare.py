"""Cost and accuracy of a layer with the default softmax and with the plugin's.

pip install examples/custom_pass
python examples/custom_pass/compare.py examples/gpt2/model --submodule h.0.attn
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fhe_fx
from fhe_fx.extend import parse_pipeline

SETTINGS = (  # name, pipeline, bits less than --n-bits
    ("default", "default", 0),
    ("default, a bit less", "default", 1),
    ("flat softmax", "default,flat-softmax@before:lower-softmax", 0),
)


def windows(model: Path, name: str, tokens: int, n: int) -> list[dict[str, Tensor]]:
    """Return the first tokens of n sentences."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [
        tokenizer(s, return_tensors="pt")["input_ids"]
        for s in (model / name).read_text().splitlines()
    ]
    return [{"input_ids": row[:, :tokens]} for row in rows if row.shape[1] >= tokens][:n]


def accuracy(model: Any, encrypted: Any, inputs: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Return the relative error of the logits, and how often the likeliest token is the same."""
    ids = torch.cat([i["input_ids"] for i in inputs])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = encrypted(ids, use_cache=False).logits
    error = float((found - expected).norm() / expected.norm())
    return error, float((found.argmax(-1) == expected.argmax(-1)).float().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Default softmax and flat softmax compared.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--submodule", default="h.0.attn")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--n-bits", type=int, default=4)
    parser.add_argument("--sentences", type=int, default=100)
    a = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(a.model).eval()
    calibration = windows(a.model, "calibration.txt", a.tokens, 128)
    held_out = windows(a.model, "heldout.txt", a.tokens, a.sentences)
    print(f"{a.submodule} of {a.model}, {a.tokens} tokens, n_bits={a.n_bits}; "
          f"logits on {len(held_out)} held-out sentences, integers in the clear")  # fmt: skip
    print(f"{'pipeline':20} {'look-ups':>9} {'bits':>5} {'complexity':>11} {'error':>7} "
          f"{'same token':>11}")  # fmt: skip
    for name, text, fewer in SETTINGS:
        encrypted = fhe_fx.encrypt_submodule(
            model,
            a.submodule,
            n_bits=a.n_bits - fewer,
            calibration=calibration,
            passes=parse_pipeline(text),
        )
        cost = fhe_fx.report(encrypted).regions[0]
        fhe_fx.set_mode(encrypted, "clear")
        error, same = accuracy(model, encrypted, held_out)
        print(f"{name:20} {cost.look_ups:9,} {cost.max_lookup_bits:5} "
              f"{cost.predicted_complexity:11.2g} {error:7.3f} {same:11.1%}")  # fmt: skip


if __name__ == "__main__":
    main()

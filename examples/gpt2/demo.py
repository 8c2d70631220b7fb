"""Encrypts the first attention of the small GPT-2 and lets it write: float, integers, ciphertext.

    make demo
    python examples/gpt2/demo.py --prompt "He had never seen" --submodule h.0.attn --n-bits 4
    python examples/gpt2/demo.py --model gpt2 --heads 0     # the real one, where its weights are

Three texts are printed: the float model's, the one with the attention in clear integers, and the
one whose next token (or more, --execute) came from an attention that ran on ciphertexts.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fhe_fx
from fhe_fx.report.machine import machine_name

HERE = Path(__file__).parent
SHIPPED = HERE / "model"


def main() -> None:
    """Run the demonstration."""
    choices = _choices()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(choices.model)
    model = AutoModelForCausalLM.from_pretrained(choices.model).eval()
    prompt = tokenizer(choices.prompt, return_tensors="pt")
    n_prompt = prompt["input_ids"].shape[1]
    tokens = choices.tokens or n_prompt + choices.new_tokens - 1
    print(f"fhe_fx {fhe_fx.__version__} on {machine_name()}")
    shown = os.path.relpath(choices.model) if Path(choices.model).exists() else choices.model
    print(f"model {shown}, {sum(p.numel() for p in model.parameters()):,} parameters")

    start = time.perf_counter()
    encrypted = fhe_fx.encrypt_submodule(
        model,
        choices.submodule,
        n_bits=choices.n_bits,
        max_tokens=tokens,
        heads=choices.heads,
        calibration=_calibration(choices.model, tokenizer),
    )
    print(f"\nlowered in {time.perf_counter() - start:.1f} s; compiling ...", flush=True)
    cost = fhe_fx.compile(encrypted).regions[0]

    texts = {}
    for mode, label, n_new in (
        ("disable", "float", choices.new_tokens),
        ("clear", "clear integers", choices.new_tokens),
        ("execute", "encrypted", choices.execute),
    ):
        if mode == "execute":
            seconds = (cost.estimated_seconds or 0) * n_new
            print(
                f"\nexecuting {n_new} token(s) on ciphertexts, about {seconds:.0f} s ...",
                flush=True,
            )
        fhe_fx.set_mode(encrypted, mode)
        start = time.perf_counter()
        with torch.no_grad():
            ids = encrypted.generate(
                **prompt, max_new_tokens=n_new, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
        texts[label] = (ids[0, n_prompt:].tolist(), time.perf_counter() - start)

    print(f"\nprompt: {choices.prompt!r}")
    expected = texts["float"][0]
    for label, (ids, seconds) in texts.items():
        agree = "" if label == "float" else _agreement(ids, expected)
        print(f"  {label:15} {tokenizer.decode(ids)!r}{agree}   ({seconds:.1f} s)")
    print(
        f"\n{cost.look_ups:,} look-ups of at most {cost.max_lookup_bits} bits for {tokens} tokens, "
        f"complexity {cost.complexity:.2e}, keys {(cost.key_bytes or 0) / 1e9:.2f} GB, "
        f"compiled in {cost.compile_seconds:.1f} s"
    )


def _agreement(ids: list[int], expected: list[int]) -> str:
    same = sum(a == b for a, b in zip(ids, expected, strict=False))
    return f"   {same} of {len(ids)} token(s) as in float"


def _calibration(model: str, tokenizer: object) -> list[object] | None:
    """Return the sentences shipped beside the small model; any other model samples its own."""
    path = Path(model) / "calibration.txt"
    if not path.exists():
        return None
    lines = path.read_text().splitlines()
    return [tokenizer(line, return_tensors="pt") for line in lines]  # type: ignore[operator]


def _choices() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=str(SHIPPED), help="directory or hub name")
    parser.add_argument("--prompt", default="He had never seen")
    parser.add_argument("--submodule", default="h.0.attn")
    parser.add_argument("--heads", type=int, nargs="*", default=None)
    parser.add_argument("--n-bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=None, help="rows that the circuit takes")
    parser.add_argument("--new-tokens", type=int, default=5)
    parser.add_argument("--execute", type=int, default=1, help="tokens to compute on ciphertexts")
    return parser.parse_args()


if __name__ == "__main__":
    main()

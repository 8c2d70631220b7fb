"""Lets a small GPT-2 write while its first attention runs with noise, and on ciphertexts.

    make demo
    python examples/gpt2/demo.py --prompt "He had never seen" --submodule h.0.attn --n-bits 4
    python examples/gpt2/demo.py --model gpt2 --heads 0     # the real one, where its weights are

Each prompt is continued by the float model, and with the attention at two precisions, enough bits
and too few, with the noise that encryption would have. Then the first token (or more, --execute)
of one prompt comes out of an attention that runs on ciphertexts: of the shortest prompts, the one
whose next token leads by most. The attention has circuits of several lengths; each token takes the
shortest that fits.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fhe_fx
from fhe_fx.report.machine import machine_name, machine_rates
from fhe_fx.runtime.generate import lengths_for, plan_generation

HERE = Path(__file__).parent
SHIPPED = HERE / "model"
PROMPTS = ["It was a truth", "He had never seen", "She was not at all", "The old house stood in"]


def main() -> None:
    """Run the demonstration."""
    choices = _choices()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(choices.model)
    model = AutoModelForCausalLM.from_pretrained(choices.model).eval()
    prompts = [tokenizer(text)["input_ids"] for text in choices.prompt or PROMPTS]
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    lengths = choices.tokens or lengths_for(shortest, longest - shortest + choices.new_tokens)
    print(f"fhe_fx {fhe_fx.__version__} on {machine_name()}")
    shown = os.path.relpath(choices.model) if Path(choices.model).exists() else choices.model
    print(f"model {shown}, {sum(p.numel() for p in model.parameters()):,} parameters")

    encrypted = {}
    for n_bits in (choices.n_bits, choices.low_bits):
        start = time.perf_counter()
        encrypted[n_bits] = fhe_fx.encrypt_submodule(
            model,
            choices.submodule,
            n_bits=n_bits,
            max_tokens=lengths,
            heads=choices.heads,
            calibration=_calibration(choices.model, tokenizer),
        )
        fhe_fx.compile(encrypted[n_bits], verbose=False)
        fhe_fx.set_mode(encrypted[n_bits], "simulate")
        seconds = time.perf_counter() - start
        said = f"{choices.submodule} lowered at {n_bits} bits for {', '.join(map(str, lengths))}"
        print(f"{said} tokens in {seconds:.0f} s", flush=True)

    for ids in prompts:
        print(f"\n{tokenizer.decode(ids)!r}")
        expected = _write(model, ids, choices.new_tokens)
        print(f"  float   {tokenizer.decode(expected)!r}")
        for n_bits, changed in encrypted.items():
            found = _write(changed, ids, choices.new_tokens)
            print(f"  {n_bits} bits  {tokenizer.decode(found)!r}{_agreement(found, expected)}")

    print()
    decided = max((p for p in prompts if len(p) == shortest), key=lambda ids: _lead(model, ids))
    _execute(encrypted[choices.n_bits], model, decided, choices.execute, tokenizer)


def _execute(encrypted: Any, model: Any, ids: list[int], n_new: int, tokenizer: Any) -> None:
    fhe_fx.compile(encrypted)
    fhe_fx.set_mode(encrypted, "execute")
    plan = plan_generation(encrypted, len(ids), n_new)
    seconds = (plan.complexity or 0) / machine_rates().complexity_per_second
    print(f"\nexecuting on ciphertexts, {plan}, about {seconds:.0f} s ...", flush=True)
    expected = _write(model, ids, n_new)
    found = []
    for token in fhe_fx.generate(encrypted, ids, max_new_tokens=n_new):
        found.append(token.id)
        took = f"circuit of {token.circuit} tokens, {token.seconds:.0f} s"
        print(f"  {tokenizer.decode(ids)!r} -> {tokenizer.decode([token.id])!r}   ({took})")
        ids = [*ids, token.id]
    print(f"encrypted{_agreement(found, expected)}")


def _lead(model: Any, ids: list[int]) -> float:
    """Return by how much the next token leads: where two are nearly even, noise decides."""
    with torch.no_grad():
        first, second = model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
    return float(first - second)


def _write(model: Any, ids: list[int], n_new: int) -> list[int]:
    return [token.id for token in fhe_fx.generate(model, ids, max_new_tokens=n_new)]


def _agreement(ids: list[int], expected: list[int]) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids)
    )
    if same == len(ids):
        return f"   as in float, {len(ids)} of {len(ids)} token(s)"
    return f"   leaves the float text at token {same + 1}"


def _calibration(model: str, tokenizer: Any) -> list[object] | None:
    """Return the sentences shipped beside the small model; any other model samples its own."""
    path = Path(model) / "calibration.txt"
    if not path.exists():
        return None
    return [tokenizer(line, return_tensors="pt") for line in path.read_text().splitlines()]


def _choices() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=str(SHIPPED), help="directory or hub name")
    parser.add_argument("--prompt", action="append", help="text to go on from; may be repeated")
    parser.add_argument("--submodule", default="h.0.attn")
    parser.add_argument("--heads", type=int, nargs="*", default=None)
    parser.add_argument("--n-bits", type=int, default=4, help="enough precision; executed")
    parser.add_argument("--low-bits", type=int, default=2, help="too little precision")
    parser.add_argument("--tokens", type=int, nargs="*", default=None, help="lengths of circuits")
    parser.add_argument("--new-tokens", type=int, default=5)
    parser.add_argument("--execute", type=int, default=1, help="tokens to compute on ciphertexts")
    return parser.parse_args()


if __name__ == "__main__":
    main()

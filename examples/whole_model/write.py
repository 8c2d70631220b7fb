"""A language model of which all is encrypted writes: the client embeds, encrypts and samples.

    python examples/whole_model/write.py              # accuracy, then three tokens on ciphertexts
    python examples/whole_model/write.py --new-tokens 0     # accuracy alone

The server computes both layers, the last norm and the logits without seeing a token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fhe_fx
from fhe_fx.report.machine import machine_name

HERE = Path(__file__).parent
SENTENCES = HERE.parent / "gpt2" / "model"
"""Of the same corpus: the model has seen those of calibration, not the held-out ones."""


def main() -> None:
    """Encrypt, measure, write."""
    choices = _choices()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(choices.model)
    model = AutoModelForCausalLM.from_pretrained(choices.model).eval()
    calibration, held_out = (
        [tokenizer(s, return_tensors="pt")["input_ids"] for s in lines.splitlines()]
        for lines in (
            (SENTENCES / f"{name}.txt").read_text() for name in ("calibration", "heldout")
        )
    )
    print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    encrypted = fhe_fx.encrypt_submodule(
        model,
        "",  # all of it
        n_bits=choices.n_bits,
        max_tokens=choices.tokens,
        calibration=calibration,
        cache=fhe_fx.Cache(),
    )
    for circuit in fhe_fx.compile(encrypted, verbose=False).regions:
        print(circuit.line())

    prompts = [ids[:, : choices.tokens] for ids in held_out if ids.shape[1] >= choices.tokens]
    for mode, positions in (("clear", choices.positions), ("simulate", choices.simulated)):
        _compare(model, encrypted, prompts[: -(-positions // choices.tokens)], mode)
    if choices.new_tokens:
        _write(model, encrypted, tokenizer, choices)


def _compare(model: Any, encrypted: Any, prompts: list[Tensor], mode: str) -> None:
    """Print how often the most likely next token is float's, over all positions of prompts."""
    if not prompts:
        return
    fhe_fx.set_mode(encrypted, mode)
    with torch.no_grad():
        exact = torch.cat([model(input_ids=ids).logits for ids in prompts]).flatten(0, 1)
        ours = encrypted(input_ids=torch.cat(prompts)).logits.flatten(0, 1)
    same = ours.argmax(-1) == exact.argmax(-1)
    among = (exact.topk(5).indices == ours.argmax(-1, keepdim=True)).any(-1)
    # Softmax takes no notice of what all logits of a position have in common.
    ours, exact = (x - x.mean(-1, keepdim=True) for x in (ours, exact))
    error = float((ours - exact).norm() / exact.norm())
    print(
        f"{mode:9} {len(same)} positions: same next token {100 * float(same.float().mean()):.1f} %,"
        f" among float's five {100 * float(among.float().mean()):.1f} %,"
        f" relative error of logits {error:.3f}"
    )


def _write(model: Any, encrypted: Any, tokenizer: Any, choices: argparse.Namespace) -> None:
    """Print a text that the float model, its integers and its circuit write."""
    prompt = tokenizer(choices.prompt)["input_ids"]
    print(f"\n{machine_name()}\n{choices.prompt!r}")
    for mode in ("disable", "clear", "execute"):
        fhe_fx.set_mode(encrypted, mode)
        written: list[int] = []
        seconds: list[float] = []
        for token in fhe_fx.generate(encrypted, prompt, max_new_tokens=choices.new_tokens):
            written.append(token.id)
            seconds.append(token.seconds)
            if mode == "execute":
                print(f"  {tokenizer.decode([token.id])!r} in {token.seconds:.0f} s", flush=True)
        label = {"disable": "float", "clear": "integers", "execute": "encrypted"}[mode]
        print(f"  {label:9} {tokenizer.decode(written)!r}")


def _choices() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--n-bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=3, help="rows of the circuit")
    parser.add_argument("--positions", type=int, default=200, help="compared in integers")
    parser.add_argument("--simulated", type=int, default=200, help="compared with noise")
    parser.add_argument("--prompt", default="I")
    parser.add_argument("--new-tokens", type=int, default=3, help="written on ciphertexts")
    return parser.parse_args()


if __name__ == "__main__":
    main()

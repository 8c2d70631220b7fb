"""What the benchmarks share: models, inputs that calibration never saw, costs and errors."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.quant.calibration import sample_from_model
from fhe_fx.report import RegionCost
from fhe_fx.runtime.region import Region

SHIPPED = Path(__file__).parent.parent / "examples" / "gpt2" / "model"
Row = dict[str, Any]


def random_gpt2() -> Any:
    """Return GPT-2 with random weights, always the same."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


def shipped_gpt2() -> Any:
    """Return the small trained GPT-2 of the examples."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(SHIPPED).eval()


def shipped_sentences(name: str, tokens: int) -> list[Tensor]:
    """Return the first `tokens` tokens, `[1, tokens]`, of the sentences that are long enough.

    Args:
        name: "calibration.txt", or "heldout.txt", which neither training nor calibration saw.
        tokens: length.
    """
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    lines = (SHIPPED / name).read_text().splitlines()
    ids = [tokenizer(line, return_tensors="pt")["input_ids"] for line in lines]
    return [i[:, :tokens] for i in ids if i.shape[1] >= tokens]


def region_of(encrypted: nn.Module) -> Region:
    """Return the one encrypted region of a model."""
    region: Region = encrypted_modules(encrypted)[0].region
    return region


def fresh_inputs(encrypted: nn.Module, n: int, tokens: int) -> Tensor:
    """Return what enters the region on `n` sentences that the model writes with another seed."""
    calls = sample_from_model(encrypted, tokens, fhe_fx.Options(n_samples=n, seed=1))
    found: list[Tensor] = []
    hook = encrypted_modules(encrypted)[0].register_forward_pre_hook(
        lambda _, args, given: found.append(next(iter((*args, *given.values()))).detach()),
        with_kwargs=True,
    )
    with torch.no_grad():
        for call in calls:
            encrypted(*call.args, **call.kwargs)
    hook.remove()
    inputs = torch.stack(found[-n:])
    # The client's prefix only reshapes.
    return inputs.reshape(-1, *region_of(encrypted).captured.samples[0][0].shape)


def region_error(region: Region, inputs: Sequence[Tensor], mode: str) -> float:
    """Return the error of the circuit's first result, relative to the float part's, over inputs."""
    error = size = 0.0
    for x, found in zip(inputs, region.run_circuits([[x] for x in inputs], mode), strict=True):
        expected = region.captured(x)[0]
        error += float((found[0] - expected).square().sum())
        size += float(expected.square().sum())
    return float(f"{(error / size) ** 0.5:.3g}")


def module_error(encrypted: nn.Module, inputs: list[Tensor], mode: str) -> float:
    """Return the relative error of the encrypted part's first result, over token numbers."""
    module = encrypted_modules(encrypted)[0]
    outputs: list[Tensor] = []

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


def agreement(encrypted: nn.Module, inputs: list[Tensor]) -> float:
    """Return how often the most likely next token is the float model's, over all positions."""
    best = {}
    with torch.no_grad():
        for mode in ("disable", "clear"):
            fhe_fx.set_mode(encrypted, mode)
            best[mode] = torch.cat([encrypted(ids).logits.argmax(-1) for ids in inputs])
    return round(float((best["clear"] == best["disable"]).float().mean()), 4)


def cost_row(cost: RegionCost) -> Row:
    """Return what a compiled circuit costs."""
    return {
        "look_ups": cost.look_ups, "complexity": cost.complexity,
        "predicted_complexity": cost.predicted_complexity,
        "max_lookup_bits": cost.max_lookup_bits, "p_error": cost.p_error,
        "key_bytes": cost.key_bytes,
        "compile_seconds": round(cost.compile_seconds or 0, 1),
    }  # fmt: skip


def peak_gigabytes() -> float:
    """Return the most memory that this process held so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)

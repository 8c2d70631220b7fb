"""Past keys and values as inputs, and results in any structure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.options import Options
from tests.models import tiny_gpt2


class Step(nn.Module):
    """One step of an attention that keeps a cache of transformers."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> dict[str, Any]:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        cache.update(*past, 0)
        y = self.attention(x, past_key_values=cache)[0]
        return {"output": y, "past": (cache.layers[0].keys, cache.layers[0].values)}


class Model(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Any:
        return self.step(x, (keys, values))


def test_a_step_with_past_keys_and_values() -> None:
    generator = torch.Generator().manual_seed(0)

    def call() -> tuple[Tensor, ...]:
        return tuple(
            (torch.rand(*shape, generator=generator) - 0.4).cumsum(-1) / 3
            for shape in ((1, 1, 16), (1, 2, 2, 8), (1, 2, 2, 8))
        )

    model = Model(Step(tiny_gpt2(n_layer=1).transformer.h[0].attn)).eval()
    calls = [call() for _ in range(30)]
    found = fhe_fx.encrypt_submodule(
        model, "step", calibration=calls, options=Options(n_bits=6, n_samples=8)
    )
    (part,) = encrypted_modules(found)
    assert part.signature.encrypted == ("args[0]", "args[1][0]", "args[1][1]")
    fhe_fx.set_mode(found, "clear")
    with torch.no_grad():
        ours, theirs = found(*calls[0]), model(*calls[0])
    assert ours["past"][0].shape == theirs["past"][0].shape == (1, 2, 3, 8)
    for a, b in zip(
        (ours["output"], *ours["past"]), (theirs["output"], *theirs["past"]), strict=True
    ):
        assert float((a - b).norm() / b.norm()) < 0.1

"""untie-scales: sums that would tie a value's scale to that of a weighted copy of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx.api import encrypted_modules


class _Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.part(x)
        return result


class _Skip(nn.Module):
    """tanh(l(x) + x), or tanh(l(exp(x)) + exp(x)), the sum of a value and its weighted self."""

    def __init__(self, has_map: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6)
        self.has_map = has_map

    def forward(self, x: Tensor) -> Tensor:
        y = torch.exp(x) if self.has_map else x
        return torch.tanh(self.linear(y) + y)


def _worst(has_map: bool) -> tuple[float, str]:
    generator = torch.Generator().manual_seed(1)
    inputs = [0.2 + torch.rand(1, 6, generator=generator) ** 2 for _ in range(64)]
    model = _Holder(_Skip(has_map))
    encrypted = fhe_fx.encrypt_submodule(model, "part", n_bits=6, calibration=inputs)
    fhe_fx.set_mode(encrypted, "clear")
    with torch.no_grad():
        errors = [float((encrypted(x) - model(x)).abs().max()) for x in inputs[:16]]
    return max(errors), str(encrypted_modules(encrypted)[0].region.program)


def test_an_input_added_to_its_weighted_self_keeps_a_scale_of_its_own() -> None:
    error, text = _worst(has_map=False)
    assert error < 0.02
    assert "scale(%0, int64[1, 6])" in text


def test_a_looked_up_value_added_to_its_weighted_self_keeps_a_scale_of_its_own() -> None:
    error, _ = _worst(has_map=True)
    assert error < 0.03

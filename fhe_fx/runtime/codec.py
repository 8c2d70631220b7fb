"""The client's side of a value type: real tensors to integers and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fhe_fx.backends.base import Integers
from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program
from fhe_fx.ir.types import ValueType

__all__ = ["decode", "encode"]


def encode(program: Program, inputs: Sequence[Tensor]) -> list[Integers]:
    """Quantize one real tensor for each original input; values beyond the range are clipped.

    Returns:
        One array for each placeholder of the program.
    """
    encoded = []
    for node in program.placeholders:
        value_type: ValueType = node.meta["type"]
        real = inputs[program.source_of(node)].detach().double()
        whole = ((real - value_type.offset) / value_type.scale).round()
        encoded.append(whole.clamp(value_type.low, value_type.high).long().numpy())
    return encoded


def decode(program: Program, results: Sequence[Integers]) -> list[Tensor]:
    """Turn decrypted integers into real tensors, float32."""
    return [
        _real(node, torch.from_numpy(q)) for node, q in zip(program.results, results, strict=True)
    ]


def _real(node: fx.Node, q: Tensor) -> Tensor:
    value_type: ValueType = node.meta["type"]
    return (q * value_type.scale + value_type.offset).reshape(d.shape_of(node)).float()

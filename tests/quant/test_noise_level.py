"""The noise of sums, foretold in float and read off integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR
from fhe_fx.ir.program import Program
from fhe_fx.passes import default_pipeline
from fhe_fx.passes.allot_bits import AllotBits
from fhe_fx.passes.assign_scales import AssignScales
from fhe_fx.passes.base import Pipeline
from fhe_fx.quant.noise_level import NoiseLevel, behind_look_ups, bits_to_spare, greatest_weight
from tests.programs import program_from, seeded

W, V = (seeded((32, 32), n=1, seed=seed)[0] / 6 for seed in (3, 4))
SAMPLES = [(x,) for x in seeded((3, 32), n=32)]


def _sums(x: Tensor) -> Tensor:
    return torch.tanh(torch.tanh(x) @ W) @ V


def _centred_answers(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    return torch.exp(y - y.mean(-1, keepdim=True))


def _short_and_long_sums(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    short, long = y[:1] + y[1:2], y[:1] + 3 * y[1:2] + 2 * y[2:]
    return torch.exp(short) + torch.exp(0.3 * long)


def _lowered(function: Callable[[Tensor], Tensor]) -> tuple[NoiseLevel, NoiseLevel]:
    """Return the noise foretold where bits have been allotted, and that of the integers."""
    passes = [
        dataclasses.replace(p, room_bits=0) if isinstance(p, AssignScales) else p
        for p in default_pipeline()
    ]
    program = program_from(function, SAMPLES, p_error=0.1)
    split = [p.name for p in passes].index(AllotBits.name) + 1
    Pipeline(tuple(passes[:split])).run(program)
    foretold = NoiseLevel.of(program)
    Pipeline(tuple(passes[split:])).run(program)
    return foretold, NoiseLevel.of(program)


@pytest.mark.parametrize("function", [_sums, _centred_answers, _short_and_long_sums])
def test_it_is_foretold_within_half_a_bit(function: Callable[[Tensor], Tensor]) -> None:
    foretold, found = _lowered(function)
    assert found.look_ups > 1
    assert foretold.look_ups == pytest.approx(found.look_ups, abs=0.5)
    assert foretold.results == pytest.approx(found.results, abs=0.5)


def _two_products() -> tuple[Program, list[torch.fx.Node]]:
    program = program_from(lambda x: torch.cat([torch.tanh(x) @ W, torch.tanh(x) @ V], -1), SAMPLES)
    Pipeline(tuple(default_pipeline())[:-4]).run(program)
    return program, [
        n for n in program.calls(LINEAR) if d.input_node(n) in behind_look_ups(program)
    ]


def test_weights_of_the_same_answers_become_smaller_together() -> None:
    program, products = _two_products()
    behind = behind_look_ups(program)
    usual = greatest_weight(program, products[0], behind)
    alike = dict.fromkeys(products, 4 * usual)
    assert bits_to_spare(program, behind, alike) == pytest.approx(2)
    # One that errs a hundred times less than another may be coarse for the sake of the other.
    assert len(products) == 2
    for n, response in zip(products, (1.0, 0.01), strict=True):
        n.meta["weight_response"] = response
    uneven = dict(zip(products, (4 * usual, usual), strict=True))
    assert 1.7 < bits_to_spare(program, behind, uneven) < 2
    uneven = dict(zip(products, (usual, 4 * usual), strict=True))
    assert 0 < bits_to_spare(program, behind, uneven) < 0.1

"""`assign-scales`: one scale a class, wide enough accumulators."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fhe_fx.errors import BitWidthError
from fhe_fx.ir import Program
from fhe_fx.ir import dialect as d
from fhe_fx.options import Options
from fhe_fx.passes import Pipeline, default_pipeline
from fhe_fx.passes.assign_scales import AssignScales
from fhe_fx.quant.noise_level import NoiseLevel
from fhe_fx.quant.ranges import times_to_fill
from tests.programs import lower, program_from, seeded

SAMPLES = [(x,) for x in seeded((2, 4))]


def _scaled(function: object, weight_bits: int = 8) -> Program:
    program = program_from(function, SAMPLES)  # type: ignore[arg-type]
    program.options = Options(n_bits=4, weight_bits=weight_bits, p_error=0.1)
    Pipeline(tuple(default_pipeline())[:-1]).run(program)
    return program


def test_a_looked_up_range_fills_its_encoding() -> None:
    program = _scaled(torch.exp)
    node = d.input_node(program.maps()[0])
    low, high = node.meta["range"]
    scale, width = node.meta["scale"], node.meta["width"]
    assert width == 6 + 6
    filled = (high - low) / (scale * 2**width)
    assert torch.allclose(filled, torch.ones(2, 4, dtype=torch.float64))


def test_channels_keep_scales_apart_and_a_sum_ties_them() -> None:
    gains = torch.tensor([1.0, 2.0, 4.0, 8.0])
    apart = _scaled(lambda x: torch.tanh(x * gains))
    assert len(apart.placeholders[0].meta["scale"].unique()) == 4
    tied = _scaled(lambda x: torch.tanh(x.sum(-1)))
    assert len(tied.placeholders[0].meta["scale"].unique()) == 1


def test_refuses_accumulators_that_a_ciphertext_cannot_hold() -> None:
    weights = [torch.randn(4, 4, generator=torch.Generator().manual_seed(k)) for k in range(3)]

    def function(x: torch.Tensor) -> torch.Tensor:
        for w in weights:
            x = (x.unsqueeze(-1) * w).sum(-2)
        return torch.exp(0.1 * x)

    with pytest.raises(BitWidthError) as error:
        _scaled(function, weight_bits=16)
    assert "a ciphertext holds 40." in str(error.value)
    assert str(error.value).endswith("Try weight_bits=14, or a smaller n_bits.")


def test_two_bits_less_for_weights_of_answers_are_two_bits_less_noise() -> None:
    w = seeded((64, 32), n=1, seed=3)[0]

    def log_norm(bits: int) -> float:
        program = program_from(
            lambda x: torch.tanh(torch.tanh(x) @ w), [(x,) for x in seeded((2, 64), n=16)],
            answer_weight_bits=bits, p_error=0.1,
        )  # fmt: skip
        lower(program)
        return NoiseLevel.of(program).look_ups

    assert log_norm(8) - log_norm(6) == pytest.approx(2, abs=0.05)


def _slots_and_norm(room_bits: int) -> tuple[float, float]:
    """Return how much wider slots are than ranges ask for, at worst, and the noise.

    The same values are read alone and in sums, which reach farther, and behind them heavier sums.
    """
    w = seeded((16, 8), n=1, seed=3)[0]

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = torch.sigmoid(x) + torch.sigmoid(y), 0.2 * torch.exp(y)
        return torch.tanh(torch.cat([torch.tanh(a + b), torch.tanh(a)], -1) @ w)

    inputs = zip(*(seeded((2, 8), n=16, seed=seed) for seed in (5, 6)), strict=True)
    program = program_from(function, list(inputs), p_error=0.1)
    passes = [
        dataclasses.replace(p, room_bits=room_bits) if isinstance(p, AssignScales) else p
        for p in default_pipeline()
    ]
    Pipeline(tuple(passes[:-1])).run(program)
    sources = [d.input_node(n) for n in program.maps()]
    empty = [
        float(
            (
                n.meta["scale"] * 2.0 ** n.meta["width"] / times_to_fill(n)
                / (n.meta["range"][1] - n.meta["range"][0])
            ).max()
        )
        for n in sources
    ]  # fmt: skip
    Pipeline(tuple(passes[-1:])).run(program)
    return max(empty), NoiseLevel.of(program).look_ups


def test_a_narrow_range_beside_a_wide_one_fills_its_slots_and_noise_stays() -> None:
    (before, norm), (after, norm_after) = _slots_and_norm(0), _slots_and_norm(3)
    assert before > 1.3
    assert after < 1.13  # 9 / 8
    assert norm_after == pytest.approx(norm, abs=0.05)

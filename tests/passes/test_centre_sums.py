"""`centre-sums`: channels of one scale whose values lie around different centres."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import SHIFT
from fhe_fx.ir.program import Program
from fhe_fx.passes import default_pipeline
from fhe_fx.passes.base import Pipeline
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.passes.centre_sums import CentreSums
from fhe_fx.testing import assert_equivalent, float_program
from tests.programs import program_from, relative_error, run_all, run_integers, seeded

CHANNELS = 16
RAMP = torch.linspace(1, 30, CHANNELS)
SPREAD: list[tuple[Tensor, ...]] = [(x,) for x in seeded((2, CHANNELS), n=64, seed=1)]


def _spread_centres(x: Tensor) -> Tensor:
    """A value of every channel beside one of the row, times a number of the channel."""
    row = torch.tanh(x.sum(-1, keepdim=True)) / 30 + 2.0
    return (x + row * RAMP - 2.0 * RAMP).square()


def _run(centring: CentreSums | None, samples: list[tuple[Tensor, ...]]) -> Program:
    program = program_from(_spread_centres, samples, n_bits=6, p_error=0.05)
    passes = [centring if isinstance(p, CentreSums) else p for p in default_pipeline()]
    Pipeline(tuple(p for p in passes if p is not None)).run(program)
    return program


def test_channels_around_their_own_centres_err_less() -> None:
    unseen = [(x,) for x in seeded((2, CHANNELS), n=16, seed=2)]
    (expected,) = run_all(program_from(_spread_centres, SPREAD), unseen)
    errors = [
        relative_error(expected, run_integers(_run(p, SPREAD), unseen)[0])
        for p in (None, CentreSums())
    ]
    assert errors[1] < errors[0] / 2.5, errors


@pytest.mark.parametrize("limits", [{"least_channels": CHANNELS + 1}, {"least_gain": 10.0}])
def test_what_gains_little_is_left(limits: dict[str, float]) -> None:
    wide, usual = _run(CentreSums(**limits), SPREAD), _run(None, SPREAD)  # type: ignore[arg-type]
    assert str(wide) == str(usual)


def _read_twice(b: Builder, x: torch.fx.Node) -> torch.fx.Node:
    total = b.expand(b.sum(x, [1], keepdim=True), (2, CHANNELS))
    stream = b.add(x, b.scale(b.apply(total, torch.ops.aten.tanh.default), RAMP))
    one = b.apply(stream, torch.ops.aten.exp.default)
    return b.add(b.add(one, b.apply(stream, torch.ops.aten.tanh.default)), stream)


def test_all_maps_of_a_sum_read_one_shift_and_others_the_sum() -> None:
    samples: list[tuple[Tensor, ...]] = [(x + 3.0,) for (x,) in SPREAD]
    given, program = (float_program(_read_twice, list(samples[0])) for _ in range(2))
    program.samples = samples
    Calibrate().run(program)
    program.properties = program.properties | {"fused", "no-products"}
    assert CentreSums().run(program)
    (shift,) = program.calls(SHIFT)
    stream = d.input_node(shift)
    assert d.is_call(stream, d.ADD)
    assert len([u for u in shift.users if d.is_map(u)]) == 2
    assert any(d.is_call(u, d.ADD) for u in stream.users)
    assert_equivalent(given, program, samples[:4])
    Calibrate().run(program)
    assert not CentreSums().run(program)  # once is enough

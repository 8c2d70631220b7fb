"""Stages: rounded floats, integers with the use of their ranges, noise and what explains it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.evaluate.run import EXCESS
from fhe_fx.evaluate.stages import Clear, FakeQuantized, Simulated
from fhe_fx.ir import Program
from fhe_fx.runtime.region import Region
from fhe_fx.runtime.staged import StagedRegion
from tests.models import shipped_gpt2
from tests.programs import lower, program_from, seeded


def _lowered(
    function: Callable[[Tensor], Tensor], n_bits: int = 4, extra: int = 2, p_error: float = 0.1
) -> Program:
    program = program_from(function, [(x,) for x in seeded((1, 16, 16))], n_bits=n_bits)
    program.options = dataclasses.replace(program.options, p_error=p_error, lookup_extra_bits=extra)
    lower(program)
    return program


@functools.cache
def _region(n_bits: int) -> Region:
    encrypted = fhe_fx.encrypt_submodule(
        shipped_gpt2(1), "h.0.attn", heads=[0], n_bits=n_bits, max_tokens=3, input_bits=16
    )
    return encrypted_modules(encrypted)[0].region


def _error(found: list[list[Tensor]], exact: list[Tensor]) -> float:
    ours, theirs = torch.stack([row[0] for row in found]), torch.stack(exact)
    return float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


def test_rounded_floats_come_near_float_as_bits_grow() -> None:
    """Two bits more make every step a quarter; a third of the error leaves room for chance."""
    errors = []
    for n_bits in (2, 4):
        region = _region(n_bits)
        exact = [region.captured(*s)[0] for s in region.captured.samples]
        errors.append(_error(FakeQuantized(region)(region.captured.samples), exact))
    assert 0 < errors[1] < errors[0] / 3


def test_rounded_floats_are_what_the_integers_come_from() -> None:
    """Off by ranges and weights alone, the integers are nearer to them than either to float."""
    region = _region(4)
    samples = region.captured.samples
    rounded = FakeQuantized(region)(samples)
    integers = Clear(region.program)(samples)
    exact = [region.captured(*s)[0] for s in samples]
    apart = _error(integers, [row[0] for row in rounded])
    assert apart < 1.5 * max(_error(rounded, exact), _error(integers, exact))


def test_the_clear_stage_is_the_region_in_mode_clear() -> None:
    region = _region(4)
    samples = region.target.samples[:6]
    staged = StagedRegion.of(region, Clear(region.program))
    for a, b in zip(
        staged.run_many(samples, "clear"), region.run_many(samples, "clear"), strict=True
    ):
        assert torch.equal(a[0], b[0])


def test_values_outside_their_range_are_counted() -> None:
    program = _lowered(torch.tanh)
    place = program.placeholders[0]
    kind = place.meta["type"]
    for gain in (1.0, 1.4):
        samples = [(gain * s[0],) for s in program.samples]
        runner = Clear(program)
        runner(samples)
        steps = (torch.stack([s[0] for s in samples]).double() - kind.offset) / kind.scale
        whole = steps.round()
        expected = int(((whole < kind.low) | (whole > kind.high)).sum())
        counted = runner.ranges[place.name]
        assert (counted.outside, counted.total) == (expected, 16 * 256)
        assert counted.share == expected / (16 * 256)
        assert expected > 0 or gain == 1.0


@pytest.mark.parametrize("function", [torch.tanh, torch.exp, torch.square])
def test_usual_noise_is_explained(function: Callable[[Tensor], Tensor]) -> None:
    program = _lowered(function)
    runner = Simulated(program, seed=0)
    runner(program.samples)
    assert runner.excess == pytest.approx(1.0, abs=0.05)


def test_noise_that_wraps_is_not_explained() -> None:
    """Noise of four slots, on tables of four entries: most values leave the table."""
    program = _lowered(torch.tanh, n_bits=2, extra=0, p_error=0.9)
    runner = Simulated(program, seed=0)
    runner(program.samples)
    assert runner.excess > EXCESS

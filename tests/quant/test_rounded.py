"""Rounded values: how far from the exact ones, and where a function ends."""

from __future__ import annotations

import torch
from torch import Tensor

from fhe_fx.options import Options
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.quant.classes import find_classes
from fhe_fx.quant.rounded import rounded_values
from tests.conftest import float_program
from tests.programs import seeded

aten = torch.ops.aten
SAMPLES: list[tuple[Tensor, ...]] = [(x.abs() + 0.01,) for x in seeded((1, 500), n=4)]


def test_values_are_half_a_slot_away_at_most_and_evenly_so() -> None:
    program = float_program(lambda b, x: b.scale(x, 1.0), [SAMPLES[0][0]])
    program.samples, program.options = SAMPLES, Options(input_bits=4)
    Calibrate().run(program)
    classes = find_classes(program)
    found = rounded_values(program, classes, SAMPLES * 50)
    name = program.placeholders[0].name
    exact = program.observed[name].repeat(50, 1, 1)
    low, high = classes.extremes(program.placeholders[0], program.observed[name])
    slot = (high - low)[classes.of[program.placeholders[0]]] / 16
    error = (found[name] - exact) / slot
    assert float(error.abs().max()) <= 0.5 + 1e-4
    # Even on [-1/2, 1/2]: deviation 1 / sqrt(12), of 100,000 draws.
    assert abs(float(error.std()) - 12**-0.5) < 0.005
    assert abs(float(error.mean())) < 0.01


def test_a_function_answers_beyond_its_domain() -> None:
    program = float_program(lambda b, x: b.apply(x, aten.log.default), [SAMPLES[0][0]])
    program.samples, program.options = SAMPLES, Options(n_bits=2)
    Calibrate().run(program)
    found = rounded_values(program, find_classes(program), SAMPLES)
    assert bool(found[program.results[0].name].isfinite().all())

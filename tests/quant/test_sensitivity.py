"""Sensitivities: they predict what errors of a map's answers do to the results."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fhe_fx.ir import Builder
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.quant.sensitivity import sensitivities
from tests.conftest import float_program
from tests.programs import seeded

aten = torch.ops.aten
WEIGHT = torch.tensor([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0]])


def test_the_mean_square_is_the_relative_error_of_the_results() -> None:
    samples: list[tuple[Tensor, ...]] = [(x,) for x in seeded((1, 2), n=300)]
    program = float_program(
        lambda b, x: b.linear(b.apply(x, aten.tanh.default), WEIGHT), [samples[0][0]]
    )
    program.samples = samples
    Calibrate().run(program)
    found = sensitivities(program, samples, draws=20)[program.maps()[0].name]
    assert found.shape == (20, 300, 1, 2)
    size = program.observed[program.results[0].name].double().std()
    # An error e of one answer changes the results by e times a row of the weights.
    expected = WEIGHT.double().square().sum(1) / size**2
    measured = found.square().mean((0, 1, 2))
    # 6,000 draws of a weighted chi-square: within 10 %.
    torch.testing.assert_close(measured.double(), expected, rtol=0.1, atol=0)


def test_errors_that_cancel_have_gradients_that_cancel() -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.sub(b.apply(x, aten.tanh.default), b.apply(x, aten.sin.default))

    samples: list[tuple[Tensor, ...]] = [(x,) for x in seeded((1, 4))]
    program = float_program(build, [samples[0][0]])
    program.samples = samples
    Calibrate().run(program)
    a, b = sensitivities(program, samples).values()
    torch.testing.assert_close(a, -b)


def test_a_step_has_an_answer_to_differentiate_by() -> None:
    samples: list[tuple[Tensor, ...]] = [(x,) for x in seeded((1, 4))]
    program = float_program(lambda b, x: b.apply(x, aten.sign.default), [samples[0][0]])
    program.samples = samples
    Calibrate().run(program)
    (found,) = sensitivities(program, samples).values()
    assert float(found.abs().min()) > 0


def test_without_maps_there_is_nothing() -> None:
    program = float_program(lambda b, x: b.scale(x, 2.0), [torch.ones(1, 2)])
    Calibrate().run(program)
    assert sensitivities(program, program.samples) == {}

"""`calibrate`: the value of every node on every sample."""

from __future__ import annotations

import pytest
import torch

from fhe_fx.errors import CalibrationError
from fhe_fx.passes.calibrate import Calibrate
from tests.conftest import float_program

X = torch.linspace(-1, 1, 6).view(2, 3)
LOG = torch.ops.aten.log.default


def test_every_node_is_observed_and_shows_its_bounds() -> None:
    program = float_program(lambda b, x: b.scale(x, 2.0), [X])
    program.samples = [(X,), (X + 1,)]
    assert Calibrate().run(program) is True
    assert {name: tuple(v.shape) for name, v in program.observed.items()} == {
        "x0": (2, 2, 3),
        "scale_default": (2, 2, 3),
    }
    assert "in [-2, 4]" in str(program)
    assert Calibrate().run(program) is False


def test_refuses_without_samples() -> None:
    program = float_program(lambda b, x: b.scale(x, 2.0), [X])
    program.samples = []
    with pytest.raises(CalibrationError) as error:
        Calibrate().run(program)
    assert str(error.value) == ("region: there are no calibration samples. Pass calibration=[...].")


def test_refuses_values_that_are_not_finite() -> None:
    program = float_program(lambda b, x: b.apply(x, LOG), [X])
    with pytest.raises(CalibrationError) as error:
        Calibrate().run(program)
    assert str(error.value) == (
        "region: log_0 (, ) is not finite on calibration sample 0. "
        "Check the weights and the calibration data for nan and inf."
    )

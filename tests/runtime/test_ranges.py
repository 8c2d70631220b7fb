"""Counting values outside their range, and when that is worth a warning."""

from __future__ import annotations

import torch

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.runtime.ranges import RANGE_SHARE, RangeUse, range_warnings
from tests.models import Mlp, mlp_inputs


def test_a_warning_is_due_beyond_the_share_beyond_calibration_and_beyond_chance() -> None:
    assert RANGE_SHARE == 0.001
    assert not RangeUse("a", 1, 160).is_exceeded  # one of few says nothing
    assert not RangeUse("a", 100, 100_000).is_exceeded  # just the share
    assert RangeUse("a", 200, 100_000).is_exceeded
    assert not RangeUse("a", 200, 100_000, calibrated=0.002).is_exceeded  # as calibration
    assert RangeUse("a", 400, 100_000, calibrated=0.002).is_exceeded
    assert not RangeUse("a", 0, 0).is_exceeded


def test_the_warning_names_the_worst() -> None:
    uses = [RangeUse("there", 30, 1000), RangeUse("here", 90, 1000, 0.01), RangeUse("no", 0, 1000)]
    (warning,) = range_warnings(uses)
    assert warning == (
        "2 look-ups or inputs had more than 0.1% of their values outside the calibrated range, and "
        "more than calibration had; the worst, here, 9.00% of 1,000 (calibration: 1.00%). "
        "Calibrate on text like this."
    )
    assert range_warnings([uses[2]]) == []


def test_a_watched_region_counts_and_computes_the_same() -> None:
    model = fhe_fx.encrypt_submodule(Mlp(), "inner", n_bits=5, calibration=mlp_inputs())
    region = encrypted_modules(model)[0].region
    fhe_fx.set_mode(model, "clear")
    x = torch.cat([3.0 * row for row in mlp_inputs(4)])
    expected = model(x)
    watch = region.watched()
    assert torch.equal(model(x), expected)
    place = region.program.placeholders[0].name
    assert watch.uses[place].total == x.numel()
    assert watch.uses[place].outside > 0
    # On the calibration inputs themselves the two shares are one.
    again = region.watched()
    for row in mlp_inputs():
        model(row)
    for use in again.uses.values():
        assert use.share == use.calibrated
        assert not use.is_exceeded
    assert [use.share for use in again.exceeded()] == sorted(
        (use.share for use in again.uses.values() if use.outside), reverse=True
    )

"""A budget given as how often predictions stay what they are in float."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.errors import OptionsError, PassError
from fhe_fx.quant.calibration import Call
from fhe_fx.report import report_on
from fhe_fx.runtime.agreement import Agreement
from fhe_fx.runtime.module import EncryptedModule
from tests.models import Mlp, mlp_inputs

CALLS = [Call((x,), {}) for x in mlp_inputs(60)]


def _encrypted(**options: Any) -> EncryptedModule:
    model = fhe_fx.encrypt_submodule(Mlp(), "inner", calibration=mlp_inputs(60), **options)
    (part,) = encrypted_modules(model)
    return part


def test_the_cheapest_that_agrees_often_enough() -> None:
    model = Mlp().eval()
    agreement = Agreement(model, CALLS, seed=0)
    found = {}
    for target in (0.8, 0.99):
        made = _encrypted(target_agreement=target)
        part = EncryptedModule(model.inner, made.region, made.signature)
        assert agreement.simulated([part]) >= target
        (region,) = report_on([(made.region.program, None)]).regions
        error = made.region.program.options.max_error
        found[target] = (error or 0.0, region.predicted_complexity or 0.0)
    (large, cheap), (small, dear) = found[0.8], found[0.99]
    assert small < large
    assert dear > cheap


def test_an_error_is_bearable_if_noise_of_its_size_changes_little() -> None:
    model = Mlp().eval()
    made = _encrypted()
    part = EncryptedModule(model.inner, made.region, made.signature)
    agreement = Agreement(model, CALLS, seed=0)
    small, large = (agreement.error_at(target, [part]) for target in (0.99, 0.7))
    assert 1e-3 < small < large
    assert model.inner is part.original  # what was put in its place is gone


def test_what_cannot_be_reached_is_refused_with_what_was() -> None:
    with pytest.raises(PassError) as caught:
        _encrypted(target_agreement=0.999, n_bits=1, input_bits=2, weight_bits=2)
    text = str(caught.value)
    assert text.startswith("inner: target_agreement=0.999 is not reached on the calibration inputs")
    assert text.count(" at max_error=") == 4
    assert "Try more n_bits than 1" in text


def test_a_model_without_predictions_has_no_agreement() -> None:
    class OneNumber(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    with pytest.raises(OptionsError) as caught:
        fhe_fx.encrypt_submodule(
            OneNumber(), "inner", calibration=mlp_inputs(), target_agreement=0.9
        )
    assert str(caught.value) == (
        "target_agreement compares the largest of the model's results, and OneNumber returns none "
        "with several numbers. Give max_error instead."
    )

"""Random small programs: every float pass keeps their meaning, every backend gives the integers."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own habit
from hypothesis import HealthCheck, Phase, given, settings

from fhe_fx.backends.concrete import ConcreteBackend
from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.testing.strategies import Recipe, recipes
from tests.programs import (
    encode,
    lower,
    lower_with_prediction,
    program_from,
    relative_error,
    run_integers,
    seeded,
)

QUICK = settings(
    max_examples=int(os.environ.get("FHE_FX_EXAMPLES", "50")),
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a program is small already; shrinking would take minutes
    suppress_health_check=list(HealthCheck),
)


@QUICK
@given(recipes())
def test_every_pass_keeps_the_meaning(recipe: Recipe) -> None:
    program = program_from(recipe, recipe.samples(), n_bits=6)
    (expected,), (predicted,) = lower_with_prediction(program)
    (found,) = run_integers(program, program.samples)
    # Rounded weights and results add a part; what wraps may double what rounding does.
    assert relative_error(expected, found) < min(2 * predicted + 0.02, 0.35)


@settings(QUICK, max_examples=6)
@given(recipes())
def test_concrete_gives_the_integers_of_the_reference(recipe: Recipe) -> None:
    program = program_from(recipe, recipe.samples(), n_bits=3)
    lower(program)
    circuit, reference = ConcreteBackend().compile(program), ReferenceBackend().compile(program)
    for gain in (1.0, 8.0):  # in the calibrated range, and far outside: wrapped values agree too
        inputs = encode(program, program.samples[0], gain)
        for a, b in zip(reference.clear(inputs), circuit.clear(inputs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n_bits", [4, 6, 8, 10])
def test_a_layer_norm_of_a_nearly_constant_row_stays_in_its_range(n_bits: int) -> None:
    """One row has a variance of 1e-5, so its rsqrt is 237 where that of the others is about 1.

    The factor that is met so badly must not multiply the rounding of the deviations.
    """
    samples = [(x,) for x in seeded((1, 2, 2), seed=700)]
    program = program_from(lambda x: F.layer_norm(x, (2,)), samples, n_bits, p_error=0.1)
    (expected,) = lower(program)
    (found,) = run_integers(program, program.samples)
    assert float(expected.abs().max()) <= 1.001
    assert float(found.abs().max()) <= 1.5

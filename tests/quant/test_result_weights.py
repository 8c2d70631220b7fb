"""Weights in front of results: which they are, and by how much rounding them moves the results."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fhe_fx.ir import Program
from fhe_fx.ir.ops import LINEAR
from fhe_fx.passes import Pipeline, default_pipeline
from fhe_fx.passes.allot_bits import AllotBits
from fhe_fx.quant.result_weights import weighed_results, weights_response
from tests.programs import Sample, lower, program_from, relative_error, run_integers, seeded

INNER, OUTER = seeded((32, 32), n=2, seed=3)
SAMPLES: list[Sample] = [(x,) for x in seeded((2, 32), n=64)]


def _once(x: Tensor) -> Tensor:
    return torch.tanh(x) @ OUTER


def _twice(x: Tensor) -> Tensor:
    return torch.tanh(torch.tanh(x) @ INNER) @ OUTER


def _before_allotting(function: Callable[[Tensor], Tensor], bits: int) -> Program:
    program = program_from(function, SAMPLES, answer_weight_bits=bits)
    passes = tuple(default_pipeline())
    Pipeline(passes[: [p.name for p in passes].index(AllotBits.name)]).run(program)
    return program


def test_weights_behind_which_a_look_up_reads_are_not_among_them() -> None:
    program = _before_allotting(_twice, 6)
    products = program.calls(LINEAR)
    assert len(products) == 2
    assert weighed_results(program) == products[1:]


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_what_rounding_them_adds_is_predicted(bits: int) -> None:
    before = _before_allotting(_once, bits)
    predicted = math.sqrt(weights_response(before, weighed_results(before)))
    # Look-ups, inputs and results that hardly err leave the weights' error alone.
    program = program_from(
        _once, SAMPLES, n_bits=8, p_error=0.01, input_bits=14, result_bits=14,
        answer_weight_bits=bits,
    )  # fmt: skip
    (expected,) = lower(program)
    error = relative_error(expected, run_integers(program, SAMPLES)[0])
    assert predicted == pytest.approx(error, rel=0.05)

"""Weights of answers: which they are, and by how much rounding them moves the results."""

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
from fhe_fx.passes.assign_scales import AssignScales
from fhe_fx.quant.answer_weights import weighed_answers, weights_responses
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


def test_weights_are_told_apart_by_whether_a_look_up_reads_their_sums() -> None:
    program = _before_allotting(_twice, 6)
    products = program.calls(LINEAR)
    assert len(products) == 2
    assert weighed_answers(program) == (products[:1], products[1:])


def _without_room() -> Pipeline:
    """Return the usual passes, but for the room that lets weights become larger than they must."""
    room = AssignScales(room_bits=0)
    return Pipeline(tuple(room if p.name == room.name else p for p in default_pipeline()))


@pytest.mark.parametrize(
    ("function", "bits", "tolerance"),
    [*((_once, b, 0.05) for b in (3, 4, 5, 6)), *((_twice, b, 0.1) for b in (3, 4, 5))],
)
def test_what_rounding_them_adds_is_predicted(
    function: Callable[[Tensor], Tensor], bits: int, tolerance: float
) -> None:
    """Inside, the ranges by which weights become whole numbers are chosen later, near to these.

    There weights of 6 bits lie between two powers of two, and get one bit less than predicted.
    """
    before = _before_allotting(function, bits)
    inner, outer = weighed_answers(before)
    predicted = math.sqrt(sum(weights_responses(before, [*inner, *outer]).values()))
    # Look-ups, inputs and results that hardly err leave the weights' error alone.
    program = program_from(
        function, SAMPLES, n_bits=8, p_error=0.01, input_bits=14, result_bits=14,
        answer_weight_bits=bits,
    )  # fmt: skip
    (expected,) = lower(program, _without_room())
    error = relative_error(expected, run_integers(program, SAMPLES)[0])
    assert predicted == pytest.approx(error, rel=tolerance)

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
from fhe_fx.quant.answer_weights import coarser_by, weighed_answers, weights_responses
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
    [*((_once, b, 0.05) for b in (3, 4, 5, 6)), *((_twice, b, 0.1) for b in (3, 4, 5, 6))],
)
def test_what_rounding_them_adds_is_predicted(
    function: Callable[[Tensor], Tensor], bits: int, tolerance: float
) -> None:
    """Inside, the ranges by which weights become whole numbers are chosen later, near to these."""
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


def test_products_that_err_less_are_coarser_and_err_no_more() -> None:
    first, second = _before_allotting(_twice, 6).calls(LINEAR)
    assert coarser_by({first: 1.0, second: 1 / 300}, most=6) == {first: 0, second: 4}
    assert coarser_by({first: 1.0, second: 1 / 300}, most=2) == {first: 0, second: 2}
    assert coarser_by({first: 1.0, second: 0.0}, most=6) == {first: 0, second: 0}


@pytest.mark.parametrize("size", [2.0**-k for k in (3, 4, 5, 6, 20)])
def test_a_product_that_is_next_to_nothing_keeps_some_bits(size: float) -> None:
    w = seeded((16, 8), n=1, seed=3)[0]

    def function(x: Tensor) -> Tensor:
        return torch.tanh(x) @ w + torch.exp(-x.square()) @ (size * w)

    program = program_from(function, [(x,) for x in seeded((2, 16), n=32)], n_bits=4)
    passes = tuple(default_pipeline())
    split = [p.name for p in passes].index(AllotBits.name) + 1
    (expected,) = lower(program, passes[:split])
    assert min(n.meta["weight_bits"] for n in program.calls(LINEAR)) >= 2
    lower(program, passes[split:])
    assert relative_error(expected, run_integers(program, program.samples)[0]) < 0.1

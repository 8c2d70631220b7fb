"""`lower-to-integers`: affine integers and look-ups only (whole lowerings: test_operators.py)."""

from __future__ import annotations

import torch

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP, SCALE
from fhe_fx.ir.types import ValueType
from fhe_fx.passes import default_pipeline
from fhe_fx.passes.assign_scales import AssignScales
from tests.programs import lower, program_from, relative_error, run_integers, seeded

SAMPLES = [(x,) for x in seeded((2, 4))]


def test_every_node_is_an_integer_with_a_type() -> None:
    program = program_from(lambda x: torch.exp(x @ torch.ones(4, 3)) + 1, SAMPLES)
    expected = lower(program)
    for node in program.encrypted():
        assert isinstance(node.meta["type"], ValueType)
        assert node.op == "placeholder" or node.target in d.INTEGER_OPS
    assert relative_error(expected[0], run_integers(program, SAMPLES)[0]) < 0.02


def test_biases_and_scalar_factors_of_the_input_cost_nothing() -> None:
    program = program_from(lambda x: torch.tanh(3 * x + 1) - 5, SAMPLES)
    lower(program)
    look_up = program.calls(LOOKUP)[0]
    assert look_up.args[0] in program.placeholders or d.shape_of(look_up) == (2, 4)
    assert not [n for n in program.graph.nodes if n.target == SCALE]


def test_a_table_knows_the_look_up_that_it_stands_for() -> None:
    program = program_from(torch.tanh, SAMPLES)
    lower(program)
    assert program.calls(LOOKUP)[0].meta["function"] == "map[tanh]"


def test_rounding_weights_moves_no_mean() -> None:
    """Few bits, so sums are off one by one; what they lack on average is in the offset."""
    skewed = [(x.exp(),) for x in seeded((2, 4))]
    w = seeded((4, 3), n=1, seed=5)[0]
    program = program_from(lambda x: x @ w, skewed, weight_bits=2, result_bits=8, input_bits=12)
    narrow = AssignScales(guard_bits=0)
    passes = [narrow if isinstance(p, AssignScales) else p for p in default_pipeline()]
    expected = lower(program, passes)[0]
    error = run_integers(program, skewed)[0] - expected
    assert float(error.std()) > 0.02 * float(expected.std())
    assert float(error.mean(0).abs().max()) < 0.01 * float(expected.std())

"""The verifier names every fault, and points at it; the printer shows where nodes come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fhe_fx.errors import InvariantError
from fhe_fx.ir import ValueType, verify
from fhe_fx.ir.printer import format_node
from tests.conftest import float_program
from tests.programs import lower, program_from, seeded

X = torch.linspace(-1, 1, 6).view(2, 3)
SAMPLES = [(x,) for x in seeded((2, 3))]


def test_an_operator_of_another_stage_is_a_fault() -> None:
    program = float_program(lambda b, x: b.scale(x, 2.0), [X])
    node = program.results[0]
    node.target = torch.ops.aten.cumsum.default
    node.args = (node.args[0], 1)
    with pytest.raises(InvariantError) as error:
        verify(program)
    assert str(error.value) == (
        "region: 1 node(s) break the rules of the dialect.\n"
        "  scale_default: cumsum is not an operator of this stage\n"
        "  %0 = input()        float[2, 3]\n"
        "  %1 = cumsum(%0, 1)  float[2, 3]\n"
        "  ^^^^^^^^^^^^^^^^^^\n"
        "  return %1"
    )


def test_a_shape_that_is_not_true_is_a_fault() -> None:
    program = float_program(lambda b, x: b.sum(x, [1]), [X])
    program.results[0].meta["val"] = torch.empty(5, device="meta")
    with pytest.raises(InvariantError, match=r"it says shape \(5,\), its operator gives \(2,\)"):
        verify(program)


def test_an_operator_that_its_arguments_do_not_fit_is_a_fault() -> None:
    program = float_program(lambda b, x: b.view(x, (3, 2)), [X])
    node = program.results[0]
    node.args = (node.args[0], [4, 2])
    with pytest.raises(InvariantError) as error:
        verify(program)
    fault = str(error.value).split("\n")[1]
    assert fault.startswith("  reshape_default: reshape does not take its arguments: ")
    assert "[4, 2]" in fault


def test_all_faults_are_listed_at_once() -> None:
    program = float_program(lambda b, x: b.scale(b.scale(x, 2.0), 3.0), [X])
    for node in program.calls(program.results[0].target):
        del node.meta["val"]
    with pytest.raises(InvariantError, match=r"2 node\(s\) break the rules"):
        verify(program)


def test_an_integer_node_needs_a_type_and_tables_that_fit() -> None:
    program = program_from(torch.exp, SAMPLES)
    lower(program)
    look_up = next(n for n in program.graph.nodes if "lookup" in n.name and n.args)
    look_up.args = (*look_up.args[:3], 4, look_up.args[4])
    with pytest.raises(InvariantError, match="entries, a look-up of 4 bits reads 16"):
        verify(program)
    del look_up.meta["type"]
    with pytest.raises(InvariantError, match="the node has no value type"):
        verify(program)


def test_the_columns_are_statement_type_bounds_module_and_source() -> None:
    program = program_from(torch.nn.Sequential(torch.nn.Linear(3, 2)), SAMPLES)
    lower(program)
    columns = format_node(program.graph.find_nodes(op="call_function", target=_linear())[0])
    assert columns[0] == "%1 = linear(%0, int64[3, 2])"
    assert columns[1].startswith("int")
    assert columns[1].endswith("[2, 2]")
    assert columns[2].startswith("in [-")
    assert columns[3] == "0"


def _linear() -> Any:
    from fhe_fx.ir.ops import LINEAR

    return LINEAR


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(-8, 7, "int4"), (-9, 7, "int5"), (0, 7, "uint3"), (0, 0, "uint1"), (-1, 0, "int1")],
)
def test_the_width_of_a_type_counts_the_sign(low: int, high: int, text: str) -> None:
    assert str(ValueType(torch.ones(()), torch.zeros(()), low, high)) == text

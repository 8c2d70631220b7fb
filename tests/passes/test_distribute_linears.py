"""`distribute-linears`: weights in front of a sum of answers and of products of an input."""

from __future__ import annotations

import torch

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import LINEAR, LOOKUP
from fhe_fx.passes.distribute_linears import DistributeLinears
from tests.conftest import CheckPass
from tests.programs import lower, program_from, relative_error, run_integers, seeded

EXP = torch.ops.aten.exp.default
V, W = (x.view(4, 4) / 8 for x in (torch.arange(16.0), torch.arange(16.0).flip(0)))
FIRST = torch.zeros(3, dtype=torch.int64)


def _after_attention(b: Builder, x: torch.fx.Node) -> torch.fx.Node:
    """Let rows but the first be answers and the first row's value, as attention leaves them."""
    value = b.linear(b.index_select(x, 0, torch.tensor([0])), V)
    answers = b.shift(b.apply(b.index_select(x, 0, torch.tensor([1, 2])), EXP), 2.0)
    rest = b.add(answers, b.expand(value, (2, 4)))
    return b.linear(b.cat([value, rest], 0), W)


def test_the_products_of_the_input_become_one(check_pass: CheckPass) -> None:
    check_pass(
        DistributeLinears(),
        _after_attention,
        inputs=[torch.linspace(-1, 1, 12).view(3, 4)],
        before="""
            %0 = input()
            %1 = index_select(%0, 0, 0)
            %2 = linear(%1, float[4, 4])
            %3 = index_select(%0, 0, [1 2])
            %4 = map[exp](%3)
            %5 = shift(%4, 2)
            %6 = expand(%2, [2, 4])
            %7 = add(%5, %6)
            %8 = cat([%2, %7], 0)
            %9 = linear(%8, float[4, 4])
            return %9
        """,
        after="""
            %0 = input()
            %1 = index_select(%0, 0, [1 2])
            %2 = map[exp](%1)
            %3 = index_select(%2, 0, 0)
            %4 = scale(%3, 0)
            %5 = cat([%4, %2], 0)
            %6 = linear(%5, float[4, 4])
            %7 = index_select(%0, 0, 0)
            %8 = linear(%7, float[4, 4])
            %9 = index_select(%8, 1, int64[12])
            %10 = reshape(%9, [3, 4])
            %11 = shift(%10, float[3, 4])
            %12 = add(%11, %6)
            return %12
        """,
    )


def test_weights_of_one_input_alone_are_left_to_others(check_pass: CheckPass) -> None:
    check_pass(
        DistributeLinears(),
        lambda b, x: b.linear(b.add(b.apply(x, EXP), x), W),
        inputs=[torch.linspace(-1, 1, 12).view(3, 4)],
        before="""
            %0 = input()
            %1 = map[exp](%0)
            %2 = add(%1, %0)
            %3 = linear(%2, float[4, 4])
            return %3
        """,
    )


def test_no_look_up_stands_between_two_products_any_more() -> None:
    v, w = seeded((32, 32), n=2, seed=7)

    def function(x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x) + x @ v / 6) @ w

    samples = [(x,) for x in seeded((2, 32), n=32)]
    program = program_from(function, samples, n_bits=6)
    expected = lower(program)
    (look_up,) = program.calls(LOOKUP)
    assert look_up.meta["function"] == "map[tanh]"
    inputs = [n for n in program.calls(LINEAR) if d.input_node(n).op == "placeholder"]
    assert len(inputs) == 1
    assert relative_error(expected[0], run_integers(program, samples)[0]) < 0.02

"""The checks themselves: what they let pass, and what they say."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from torch import fx

from fhe_fx.ir import Builder, Program
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.views import Lookup
from fhe_fx.passes import Pass, default_pipeline
from fhe_fx.testing import (
    assert_cost,
    assert_equivalent,
    check_pass,
    float_program,
    program_from,
    seeded,
)
from fhe_fx.testing.strategies import Recipe, recipes
from tests.passes.test_random_graphs import QUICK

X = torch.linspace(-1, 1, 6).view(2, 3)
BEFORE = """
    %0 = input()
    %1 = scale(%0, 2)
    %2 = scale(%1, 3)
    return %2
"""


def chain(b: Builder, x: fx.Node) -> fx.Node:
    return b.scale(b.scale(x, 2.0), 3.0)


@dataclass(frozen=True)
class Joins(Pass):
    """Joins the factors of the chain, rightly or not."""

    name: ClassVar[str] = "joins"
    factor: float = 6.0
    says: bool = True

    def run(self, program: Program) -> bool:
        calls = program.calls(torch.ops.fhe_fx.scale.default)
        if len(calls) < 2:
            return False
        b = program.before(calls[-1], self)
        program.replace(calls[-1], b.scale(program.placeholders[0], self.factor))
        return self.says


AFTER = """
    %0 = input()
    %1 = scale(%0, 6)
    return %1
"""


def refused(rewrite: Pass, after: str | None = AFTER, notes: tuple[str, ...] = ()) -> str:
    with pytest.raises(AssertionError) as error:
        check_pass(rewrite, chain, inputs=[X], before=BEFORE, after=after, notes=notes)
    return str(error.value)


def test_a_right_pass_passes() -> None:
    program = check_pass(Joins(), chain, inputs=[X], before=BEFORE, after=AFTER)
    torch.testing.assert_close(program(X)[0], 6 * X)


def test_each_broken_promise_is_told() -> None:
    assert refused(Joins(says=False)) == "joins, run, returned False, not True."
    assert refused(Joins(), None).startswith("joins, run, is another:\n--- expected\n+++ found\n")
    assert refused(Joins(), notes=("why",)) == "joins noted [], not ['why']."
    wrong = refused(Joins(factor=5.0), AFTER.replace("6", "5"))
    assert wrong.startswith(
        "The programs do not compute the same: result 0, node scale_default_2, differs by 1, "
        "values up to 6"
    )


def test_the_first_node_that_differs_is_named() -> None:
    samples = [(x,) for x in seeded((1, 3, 4))]
    program = program_from(lambda x: torch.tanh(x @ x.mT).softmax(-1) + 1, samples, 4, p_error=0.1)
    default_pipeline().run(program)
    assert_equivalent(program, copy.deepcopy(program))
    other = copy.deepcopy(program)
    node = other.calls(LOOKUP)[1]
    tables = node.args[1]
    assert isinstance(tables, fx.Node)
    other.module.get_buffer(str(tables.target)).mul_(-1)  # every entry that is read changes
    readers = {n for n in other.calls(LOOKUP) if n.args[1] is tables}
    with pytest.raises(AssertionError) as error:
        assert_equivalent(program, other)
    first = next(n for n in other.graph.nodes if n in readers)
    assert Lookup.of(first).bits == program.options.lookup_bits
    assert f"result 0 is another, and node {first.name}, the first that differs by " in str(
        error.value
    )
    assert "^^^^" in str(error.value)


def test_programs_that_cannot_be_compared() -> None:
    samples = [(x,) for x in seeded((1, 3))]
    program = program_from(torch.tanh, samples, n_bits=4)
    given = copy.deepcopy(program)
    default_pipeline().run(program)
    with pytest.raises(ValueError, match=r"^The programs are of the stages float and integer\.$"):
        assert_equivalent(given, program)
    with pytest.raises(ValueError, match=r"^There are no samples to compare on\.$"):
        assert_equivalent(given, given, [])


@settings(QUICK, max_examples=10)
@given(recipes())
def test_random_programs_equal_themselves_after_normalize(recipe: Recipe) -> None:
    program = program_from(recipe, recipe.samples())
    given_ = copy.deepcopy(program)
    (default_pipeline().passes[0]).run(program)
    program.clean()
    program.properties.add("normal")
    assert_equivalent(given_, program)


def test_cost() -> None:
    program = program_from(torch.tanh, [(x,) for x in seeded((1, 3))], 4, p_error=0.1)
    default_pipeline().run(program)
    assert_cost(program, look_ups=3, bits=6)
    with pytest.raises(AssertionError, match=r"^3 look-ups, 2 are allowed\.\n"):
        assert_cost(program, look_ups=2)
    with pytest.raises(AssertionError, match=r"^a look-up reads 6 bits, 5 are allowed\.\n"):
        assert_cost(program, look_ups=3, bits=5)


def test_a_program_written_by_hand() -> None:
    program = float_program(lambda b, x, y: b.add(x, y), [X, X])
    assert_equivalent(program, program)

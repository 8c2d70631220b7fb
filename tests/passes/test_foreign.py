"""Lowerings that are not ours are held to their operators; every message names rule and place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fhe_fx.errors import PassError
from fhe_fx.ir import Program
from fhe_fx.passes import Pipeline
from fhe_fx.passes.lowerings import LOWERINGS, register_lowering
from fhe_fx.passes.lowerings.registry import Unsupported
from fhe_fx.passes.normalize import Normalize
from fhe_fx.testing import program_from, seeded


@torch.library.custom_op("fhe_fx_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@torch.library.custom_op("fhe_fx_tests::halves", mutates_args=())
def halves(x: Tensor) -> list[Tensor]:
    return [x[..., :2].clone(), x[..., 2:].clone()]


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@halves.register_fake
def _(x: Tensor) -> list[Tensor]:
    return [torch.empty_like(x[..., :2]), torch.empty_like(x[..., 2:])]


TWICE = torch.ops.fhe_fx_tests.twice.default
HALVES = torch.ops.fhe_fx_tests.halves.default


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    held = dict(LOWERINGS)
    yield
    LOWERINGS.clear()
    LOWERINGS.update(held)


def normalized(rule: Callable[..., Any], op: Any = TWICE, **registered: bool) -> Program:
    """Lower tanh(2 x), or the product of two halves, by a rule."""
    register_lowering(op, **registered)(rule)

    def function(x: Tensor) -> Tensor:
        if op is TWICE:
            doubled: Tensor = TWICE(x)
            return torch.tanh(doubled)
        left, right = HALVES(x)
        product: Tensor = left * right
        return product

    program = program_from(function, [(x,) for x in seeded((1, 3, 4))])
    Pipeline((Normalize(),)).run(program)
    return program


def refused(rule: Callable[..., Any], op: Any = TWICE) -> str:
    with pytest.raises(PassError) as error:
        normalized(rule, op)
    return str(error.value)


HEAD = re.compile(
    r"^Pass normalize\(\) failed: the lowering tests\.passes\.test_foreign\.\S+ of "
    r"fhe_fx_tests\.(twice|halves)\.default \(\w+\.py:\d+\) "
)


def test_one_that_is_right() -> None:
    program = normalized(lambda b, x: b.scale(x, 2.0))
    (x,) = program.samples[0]
    torch.testing.assert_close(program(x)[0], torch.tanh(2 * x))


def test_one_of_several_results() -> None:
    def rule(b: Any, x: Any) -> Any:
        return [b.index_select(x, -1, torch.tensor(i)) for i in ([0, 1], [2, 3])]

    program = normalized(rule, HALVES)
    (x,) = program.samples[0]
    torch.testing.assert_close(program(x)[0], x[..., :2] * x[..., 2:])

    def crossed(b: Any, x: Any) -> Any:
        return rule(b, x)[::-1]

    LOWERINGS.pop(HALVES)
    message = refused(crossed, HALVES)
    assert HEAD.match(message)
    assert "computes something else: node index_select_default_1 differs by" in message


def test_one_that_computes_something_else() -> None:
    message = refused(lambda b, x: b.scale(x, 3.0))
    assert HEAD.match(message)
    said = re.search(
        r"something else: node scale_default differs by (\S+), values up to (\S+)", message
    )
    assert said is not None
    assert float(said[1]) == pytest.approx(float(said[2]) / 2, rel=0.01)  # 3 x in place of 2 x
    assert "%1 = scale(%0, 3)" in message
    assert "^^^^" in message


def test_one_that_says_so_may() -> None:
    program = normalized(lambda b, x: b.scale(x, 3.0), is_exact=False)
    (x,) = program.samples[0]
    torch.testing.assert_close(program(x)[0], torch.tanh(3 * x))


def test_one_that_raises() -> None:
    def rule(b: Any, x: Any) -> Any:
        raise KeyError("no such table")

    message = refused(rule)
    assert HEAD.match(message)
    assert "failed: KeyError: 'no such table'" in message


def test_one_that_says_what_it_cannot_is_listed_as_ours_are() -> None:
    def rule(b: Any, x: Any) -> Any:
        raise Unsupported("three dimensions")

    with pytest.raises(Exception, match=r"fhe_fx_tests.twice.default .*: three dimensions"):
        normalized(rule)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda b, x: b.view(x, (4, 3)), "returned the shape [4, 3]; the operator gives [1, 3, 4]"),
        (lambda b, x: None, "returned a NoneType as result 0; a rule returns nodes, which methods"),
    ],
)
def test_one_that_returns_what_the_operator_does_not(rule: Callable[..., Any], said: str) -> None:
    message = refused(rule)
    assert HEAD.match(message)
    assert said in message


def test_what_custom_op_made_is_an_operator() -> None:
    def rule(b: Any, x: Any) -> Any:
        return b.scale(x, 2.0)

    register_lowering(twice)(rule)
    assert LOWERINGS[TWICE] is rule
    assert "scale(%0, 2)" in str(normalized(rule))


@pytest.mark.parametrize("op", [torch.erfinv, "aten.erfinv", None, torch.nn.GELU])
def test_what_is_no_operator(op: Any) -> None:
    with pytest.raises(PassError) as error:
        register_lowering(op)
    assert str(error.value) == (
        f"{op!r} is no operator of a captured graph. Give one of torch.ops, as in "
        f"torch.ops.aten.gelu.default; `fhe_fx.trace(model, example).graph` lists a model's."
    )


def test_a_rule_that_is_none_and_no_operator_at_all() -> None:
    rule: Any = 5
    with pytest.raises(PassError, match=r"^5 is no lowering: it cannot be called\.$"):
        register_lowering(TWICE)(rule)
    with pytest.raises(PassError, match=r"^register_lowering is given no operator\. Name it: "):
        register_lowering()


def test_rules_that_leave_and_nodes_of_nowhere() -> None:
    def leaves(b: Any, x: Any) -> Any:
        raise SystemExit("no licence")

    with pytest.raises(PassError, match=r"leaves of fhe_fx_tests.twice.default .*SystemExit: no"):
        normalized(leaves)
    with pytest.raises(PassError, match=r"returned a node of another graph as result 0; a rule"):
        normalized(lambda b, x: torch.fx.Graph().placeholder("x"), replace=True)

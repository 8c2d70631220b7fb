"""Whatever a pass does to a program, the message names the pass, the node and the printed lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fhe_fx.errors import FheFxError, OptionsError, PassError
from fhe_fx.ir import Program
from fhe_fx.ir import dialect as d
from fhe_fx.passes import Pass, Pipeline, base, register
from fhe_fx.testing import program_from, seeded

Run = Callable[[Pass, Program], Any]


def small() -> Program:
    """Compute gelu(x @ weights) * 2 + 1; the print shows the shape of the weights alone."""
    weights = torch.linspace(-1, 1, 80).sin().view(4, 20)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x @ weights) * 2 + 1

    program = program_from(function, [(x,) for x in seeded((2, 4))])
    Pipeline((base.get_pass("normalize")(),)).run(program)
    return program


def pass_that(run: Run, *, is_exact: bool = False) -> Pass:
    content = {"name": "foreign", "is_exact": is_exact, "run": run}
    made: Any = dataclass(frozen=True)(type("Foreign", (Pass,), content))
    return made()  # type: ignore[no-any-return]


def said(run: Run, *, is_exact: bool = False) -> str:
    with pytest.raises(PassError) as error:
        Pipeline((pass_that(run, is_exact=is_exact),)).run(small())
    return str(error.value)


def _weights(program: Program) -> torch.fx.Node:
    (linear,) = (n for n in program.encrypted() if "linear" in n.name)
    return d.input_node(linear, 1)


def doubles_in_place(p: Pass, program: Program) -> bool:
    d.constant(_weights(program)).mul_(2)
    return True


def puts_another(p: Pass, program: Program) -> bool:
    node = _weights(program)
    setattr(program.module, str(node.target), 2 * d.constant(node))
    return True


@pytest.mark.parametrize("change", [doubles_in_place, puts_another])
def test_a_constant_that_the_print_does_not_show_is_no_secret(change: Run) -> None:
    (record,) = Pipeline((pass_that(change),)).run(small())
    assert record.has_changed
    first, *lines = said(lambda p, program: not change(p, program)).split("\n")
    assert first == (
        "foreign returned False, but constant c0 changed, read by node linear_default."
    )
    assert any("linear(%0, float[4, 20])" in line for line in lines)
    exact = said(change, is_exact=True)
    assert "the graph no longer computes the same" in exact
    assert "node linear_default" in exact


def test_a_new_tensor_of_the_same_values_is_no_change() -> None:
    def copies(p: Pass, program: Program) -> bool:
        node = _weights(program)
        setattr(program.module, str(node.target), d.constant(node).clone())
        return False

    (record,) = Pipeline((pass_that(copies),)).run(small())
    assert not record.has_changed


def _set(name: str, value: Any) -> Run:
    def run(p: Pass, program: Program) -> bool:
        setattr(program, name, value)
        return False

    return run


def test_an_answer_that_is_none() -> None:
    assert said(lambda p, program: None) == (
        "foreign returned None; run returns True if it changed the printed program or a constant, "
        "else False."
    )


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (_set("module", None), "program.module is None after it, and not of GraphModule"),
        (_set("options", None), "program.options is None after it, and not of Options"),
        (_set("properties", None), "program.properties is None after it, and not of set"),
        (_set("samples", []), "it dropped the calibration samples (program.samples)"),
    ],
)
def test_what_a_program_cannot_do_without(run: Run, reason: str) -> None:
    for is_exact in (False, True):
        assert said(run, is_exact=is_exact) == (
            f"Pass foreign() failed: {reason}\n  passes before it: none"
        )


def test_a_graph_without_its_end() -> None:
    def erases(p: Pass, program: Program) -> bool:
        program.graph.erase_node(program.output_node)
        return True

    assert "the graph has lost its output node" in said(erases)


def test_a_node_before_what_it_reads() -> None:
    def moves(p: Pass, program: Program) -> bool:
        first, *_, last = program.encrypted()
        first.append(last)
        return True

    def ties(p: Pass, program: Program) -> bool:
        linear = next(n for n in program.encrypted() if "linear" in n.name)
        linear.update_arg(0, program.results[0])
        return True

    message = said(moves)
    assert "node shift_default reads scale_default, which is computed after it\n" in message
    assert message.count("^^^^") >= 2
    assert "node linear_default reads shift_default, which is computed after it\n" in said(ties)


def test_an_input_more() -> None:
    def adds(p: Pass, program: Program) -> bool:
        (known,) = program.placeholders
        with program.graph.inserting_after(known):
            program.graph.placeholder("more").meta["val"] = known.meta["val"]
        return True

    def before(p: Pass, program: Program) -> bool:
        (known,) = program.placeholders
        with program.graph.inserting_before(known):
            program.graph.placeholder("more").meta["val"] = known.meta["val"]
        return True

    assert "input more takes argument 1 of the region; there are 1, counted from 0" in said(adds)
    assert "takes argument 1 of the region; before it took 0" in said(before)


def raises(error: BaseException) -> Run:
    def run(p: Pass, program: Program) -> bool:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(), "RuntimeError"),
        (SystemExit("no licence"), "SystemExit: no licence"),
        (OptionsError("n_bits=99 is too many."), "n_bits=99 is too many."),
        (RecursionError("maximum depth"), "RecursionError: maximum depth"),
    ],
)
def test_whatever_it_raises(error: BaseException, reason: str) -> None:
    assert said(raises(error)) == f"Pass foreign() failed: {reason}\n  passes before it: none"


def test_long_messages_of_libraries_are_cut() -> None:
    message = said(raises(ValueError("\n".join(f"line {i}" for i in range(100)))))
    assert "line 11\n  ...\n  passes before it: none" in message
    assert "line 12" not in message


def test_without_samples_there_is_nothing_to_compare_on() -> None:
    program = small()
    program.samples = []
    (record,) = Pipeline((pass_that(doubles_in_place, is_exact=True),)).run(program)
    assert record.has_changed


# Registration ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    held = dict(base._REGISTRY)
    yield
    base._REGISTRY.clear()
    base._REGISTRY.update(held)


def _class(bases: tuple[type, ...] = (Pass,), **content: Any) -> Any:
    whole = {"name": "mine", "run": lambda self, program: False, **content}
    return dataclass(frozen=True)(type("Mine", bases, whole))


ALLOWED = (
    "a pipeline's text needs letters, digits, '-', '_' and '.' alone, as in 'cheaper-softmax'."
)


@pytest.mark.parametrize(
    ("offered", "message"),
    [
        (5, "5 is not a pass. Derive a class from fhe_fx.passes.Pass."),
        (sys, f"{sys!r} is not a pass. Derive a class from fhe_fx.passes.Pass."),
        (_class(()), "is not a pass. Derive a class from fhe_fx.passes.Pass."),
        (_class(name=3), "Mine has no name. Set name: ClassVar[str]."),
        (_class(name="mine, all mine"), f"Mine has the name 'mine, all mine'; {ALLOWED}"),
        (
            _class(requires="normal"),
            "Mine.requires is 'normal'; give a frozenset of properties.",
        ),
        (_class(run=Pass.run), "Mine has no run(self, program)."),
    ],
)
def test_what_is_no_pass(offered: Any, message: str) -> None:
    with pytest.raises(FheFxError) as error:
        register(offered)
    assert str(error.value).endswith(message)
    assert "mine" not in base._REGISTRY

"""Fixtures that many tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import dedent
from typing import Protocol

import pytest
import torch
from torch import Tensor, fx

from fhe_fx.ir import Builder, Program, verify
from fhe_fx.ir.printer import format_node
from fhe_fx.passes import Pass

Build = Callable[..., fx.Node]


class CheckPass(Protocol):
    """Runs a pass on a small program and compares what it was and what it became."""

    def __call__(
        self,
        rewrite: Pass,
        build: Build,
        *,
        inputs: Sequence[Tensor],
        before: str,
        after: str | None = None,
        notes: Sequence[str] = (),
    ) -> Program: ...


def float_program(build: Build, inputs: Sequence[Tensor]) -> Program:
    """Return the program that `build(builder, *placeholders)` writes, in the float stage."""
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    end = module.graph.output(())
    places = []
    for i, x in enumerate(inputs):
        with module.graph.inserting_before(end):
            place = module.graph.placeholder(f"x{i}")
        place.meta["val"] = torch.empty(x.shape, device="meta")
        places.append(place)
    result = build(Builder(module, end), *places)
    end.args = ((result,),)
    program = Program(module, samples=[tuple(inputs)], properties={"captured", "normal"})
    program.clean()
    verify(program)
    return program


def statements(program: Program) -> str:
    """Return the first printed column of every node."""
    nodes = [n for n in program.graph.nodes if n.op != "get_attr"]
    return "\n".join(format_node(n)[0] for n in nodes)


@pytest.fixture
def check_pass() -> CheckPass:
    """Compare text before and after, the flag, the outputs, and that a second run does nothing."""

    def check(
        rewrite: Pass,
        build: Build,
        *,
        inputs: Sequence[Tensor],
        before: str,
        after: str | None = None,
        notes: Sequence[str] = (),
    ) -> Program:
        program = float_program(build, inputs)
        assert statements(program) == dedent(before).strip()
        expected = program(*inputs)
        for has_changed in (after is not None, False):
            assert rewrite.run(program) is has_changed
            program.clean()
            verify(program)
            assert statements(program) == dedent(after or before).strip()
            for a, b in zip(expected, program(*inputs), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        assert [n.reason for n in program.notes] == list(notes)
        return program

    return check

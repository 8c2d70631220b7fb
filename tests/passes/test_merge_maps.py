"""`merge-maps`: equal look-ups made once."""

from __future__ import annotations

from textwrap import dedent

import torch
from torch import fx

from fhe_fx.ir import Builder
from fhe_fx.passes.merge_maps import MergeMaps
from tests.conftest import Build, float_program, statements

aten = torch.ops.aten
WEIGHT = torch.linspace(-1, 1, 16).view(4, 4)
X = torch.linspace(-1, 1, 8).view(2, 4)


def _merged(build: Build) -> tuple[str, bool]:
    program = float_program(build, [X])
    expected = program(X)
    changed = MergeMaps().run(program)
    assert all(torch.equal(a, b) for a, b in zip(program(X), expected, strict=True))
    assert MergeMaps().run(program) is False
    return statements(program), changed


def test_the_same_function_of_the_same_values_is_looked_up_once() -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.add(
            b.apply(b.linear(x, WEIGHT), aten.tanh.default),
            b.apply(b.linear(x, WEIGHT.clone()), aten.tanh.default),
        )

    text, changed = _merged(build)
    assert changed
    assert (
        text
        == dedent("""
        %0 = input()
        %1 = linear(%0, float[4, 4])
        %2 = map[tanh](%1)
        %3 = add(%2, %2)
        return %3
    """).strip()
    )


def test_another_function_of_the_same_values_stays() -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.add(b.apply(x, aten.tanh.default), b.apply(x, aten.sigmoid.default))

    assert _merged(build)[1] is False


def test_the_same_function_of_other_values_stays() -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        left = b.apply(b.linear(x, WEIGHT), aten.tanh.default)
        return b.add(left, b.apply(b.linear(x, WEIGHT + 1e-3), aten.tanh.default))

    assert _merged(build)[1] is False


def test_constants_of_a_function_count() -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.add(b.apply(x, aten.pow.Tensor_Scalar, 2), b.apply(x, aten.pow.Tensor_Scalar, 3))

    assert _merged(build)[1] is False

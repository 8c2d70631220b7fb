"""`fold-scales`: factors go where they cost nothing."""

from __future__ import annotations

import torch
from torch import fx

from fhe_fx.ir.build import Builder
from fhe_fx.passes.fold_scales import FoldScales
from tests.conftest import CheckPass

EXP = torch.ops.aten.exp.default
X = torch.linspace(-1, 1, 6).view(2, 3)
W = torch.arange(12.0).view(3, 4)


def test_a_factor_goes_into_the_weights(check_pass: CheckPass) -> None:
    check_pass(
        FoldScales(),
        lambda b, x: b.scale(b.shift(b.linear(x, W), 1.0), 2.0),
        inputs=[X],
        before="""
            %0 = input()
            %1 = linear(%0, float[3, 4])
            %2 = shift(%1, 1)
            %3 = scale(%2, 2)
            return %3
        """,
        after="""
            %0 = input()
            %1 = linear(%0, float[3, 4])
            %2 = shift(%1, 2)
            return %2
        """,
    )


def test_a_mean_stays_a_sum(check_pass: CheckPass) -> None:
    check_pass(
        FoldScales(),
        lambda b, x: b.sub(x, b.scale(b.sum(x, [1], True), 1 / 3)),
        inputs=[X],
        before="""
            %0 = input()
            %1 = sum(%0, [1], True)
            %2 = scale(%1, 0.333333)
            %3 = expand(%2, [2, 3])
            %4 = sub(%0, %3)
            return %4
        """,
        after="""
            %0 = input()
            %1 = sum(%0, [1], True)
            %2 = expand(%1, [2, 3])
            %3 = scale(%0, 3)
            %4 = sub(%3, %2)
            %5 = scale(%4, 0.333333)
            return %5
        """,
    )


def test_a_factor_that_nothing_absorbs_stays(check_pass: CheckPass) -> None:
    check_pass(
        FoldScales(),
        lambda b, x: b.add(b.scale(x, 0.3), x),
        inputs=[X],
        before="""
            %0 = input()
            %1 = scale(%0, 0.3)
            %2 = add(%1, %0)
            return %2
        """,
    )


def test_a_factor_of_a_repeated_answer_goes_into_the_weights_behind(check_pass: CheckPass) -> None:
    """It could go up from the sum again, but not to where one answer is repeated for channels."""
    factor = torch.tensor([1.0, 2.0, 5.0])

    def build(b: Builder, x: fx.Node) -> fx.Node:
        row = b.scale(b.apply(b.sum(x, [1], True), EXP), 1.5)
        both = b.add(b.scale(x, factor), b.expand(row, (2, 3)))
        own = b.expand(b.apply(row, EXP), (2, 3))
        return b.linear(b.scale(b.add(b.apply(both, EXP), own), factor), W)

    check_pass(
        FoldScales(),
        build,
        inputs=[X],
        before="""
            %0 = input()
            %1 = sum(%0, [1], True)
            %2 = map[exp](%1)
            %3 = scale(%2, 1.5)
            %4 = scale(%0, float[3])
            %5 = expand(%3, [2, 3])
            %6 = add(%4, %5)
            %7 = map[exp](%3)
            %8 = expand(%7, [2, 3])
            %9 = map[exp](%6)
            %10 = add(%9, %8)
            %11 = scale(%10, float[3])
            %12 = linear(%11, float[3, 4])
            return %12
        """,
        after="""
            %0 = input()
            %1 = sum(%0, [1], True)
            %2 = map[exp](%1)
            %3 = scale(%2, 1.5)
            %4 = expand(%3, [2, 3])
            %5 = scale(%4, float[3])
            %6 = add(%0, %5)
            %7 = scale(%6, float[3])
            %8 = map[exp](%3)
            %9 = expand(%8, [2, 3])
            %10 = map[exp](%7)
            %11 = add(%10, %9)
            %12 = linear(%11, float[3, 4])
            return %12
        """,
    )

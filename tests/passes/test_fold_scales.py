"""`fold-scales`: factors go where they cost nothing."""

from __future__ import annotations

import torch

from fhe_fx.passes.fold_scales import FoldScales
from tests.conftest import CheckPass

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

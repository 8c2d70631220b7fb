"""`fuse-maps`: one table for every elementwise computation of one tensor."""

from __future__ import annotations

import torch

from fhe_fx.passes.fuse_maps import FuseMaps
from tests.conftest import CheckPass

aten = torch.ops.aten
X = torch.linspace(-2, 2, 6).view(2, 3)


def test_a_chain_becomes_one_function(check_pass: CheckPass) -> None:
    check_pass(
        FuseMaps(),
        lambda b, x: b.apply(b.shift(b.scale(x, 0.5), 1.0), aten.tanh.default),
        inputs=[X],
        before="""
            %0 = input()
            %1 = scale(%0, 0.5)
            %2 = shift(%1, 1)
            %3 = map[tanh](%2)
            return %3
        """,
        after="""
            %0 = input()
            %1 = map[mul add tanh](%0)
            return %1
        """,
    )


def test_a_product_of_functions_of_one_tensor_is_one_function(check_pass: CheckPass) -> None:
    check_pass(
        FuseMaps(),
        lambda b, x: b.mul(x, b.apply(x, aten.sigmoid.default)),
        inputs=[X],
        before="""
            %0 = input()
            %1 = map[sigmoid](%0)
            %2 = mul(%0, %1)
            return %2
        """,
        after="""
            %0 = input()
            %1 = map[sigmoid mul](%0)
            return %1
        """,
    )


def test_a_sum_of_two_tensors_stays(check_pass: CheckPass) -> None:
    check_pass(
        FuseMaps(),
        lambda b, x, y: b.add(b.apply(x, aten.exp.default), b.apply(y, aten.exp.default)),
        inputs=[X, X + 1],
        before="""
            %0 = input()
            %1 = input()
            %2 = map[exp](%0)
            %3 = map[exp](%1)
            %4 = add(%2, %3)
            return %4
        """,
    )


def test_an_affine_chain_needs_no_table(check_pass: CheckPass) -> None:
    check_pass(
        FuseMaps(),
        lambda b, x: b.shift(b.scale(x, 0.5), 1.0),
        inputs=[X],
        before="""
            %0 = input()
            %1 = scale(%0, 0.5)
            %2 = shift(%1, 1)
            return %2
        """,
    )

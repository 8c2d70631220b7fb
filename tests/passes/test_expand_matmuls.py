"""`expand-matmuls`: elementwise products and a sum."""

from __future__ import annotations

import torch

from fhe_fx.passes.expand_matmuls import ExpandMatmuls
from tests.conftest import CheckPass

X = torch.linspace(-1, 1, 6).view(2, 3)


def test_a_product_of_two_matrices(check_pass: CheckPass) -> None:
    check_pass(
        ExpandMatmuls(),
        lambda b, x, y: b.matmul(x, y),
        inputs=[X, X.T + 1],
        before="""
            %0 = input()
            %1 = input()
            %2 = matmul(%0, %1)
            return %2
        """,
        after="""
            %0 = input()
            %1 = input()
            %2 = permute(%1, [1, 0])
            %3 = reshape(%0, [2, 1, 3])
            %4 = reshape(%2, [1, 2, 3])
            %5 = expand(%3, [2, 2, 3])
            %6 = expand(%4, [2, 2, 3])
            %7 = mul(%5, %6)
            %8 = sum(%7, [2], False)
            return %8
        """,
    )


def test_clear_weights_stay(check_pass: CheckPass) -> None:
    check_pass(
        ExpandMatmuls(),
        lambda b, x: b.linear(x, torch.ones(3, 2)),
        inputs=[X],
        before="""
            %0 = input()
            %1 = linear(%0, float[3, 2])
            return %1
        """,
    )

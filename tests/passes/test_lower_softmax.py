"""`lower-softmax`: a log-sum-exp over live entries, then exponentials."""

from __future__ import annotations

import torch

from fhe_fx.passes.lower_softmax import LowerSoftmax
from tests.conftest import CheckPass

S = torch.linspace(-1, 1, 9).view(3, 3)


def test_a_causal_softmax_gathers_its_live_pairs(check_pass: CheckPass) -> None:
    check_pass(
        LowerSoftmax(),
        lambda b, x: b.masked_softmax(x, torch.ones(3, 3, dtype=torch.bool).tril()),
        inputs=[S],
        before="""
            %0 = input()
            %1 = masked_softmax(%0, bool[3, 3], False)
            return %1
        """,
        after="""
            %0 = input()
            %1 = take_pairs(%0, [1 1 2 2 2], [0 1 0 1 2])
            %2 = index_select(%1, 0, [0 2])
            %3 = index_select(%1, 0, [1 3])
            %4 = sub(%3, %2)
            %5 = map[softplus](%4)
            %6 = add(%2, %5)
            %7 = index_select(%1, 0, 4)
            %8 = cat([%6, %7], 0)
            %9 = index_select(%8, 0, 1)
            %10 = index_select(%8, 0, 2)
            %11 = sub(%10, %9)
            %12 = map[softplus](%11)
            %13 = add(%9, %12)
            %14 = index_select(%8, 0, 0)
            %15 = cat([%13, %14], 0)
            %16 = index_select(%15, 0, [1 0])
            %17 = index_select(%16, 0, [0 0 1 1 1])
            %18 = sub(%1, %17)
            %19 = map[exp](%18)
            %20 = put_pairs(%19, [1 1 2 2 2], [0 1 0 1 2], 3, 3)
            %21 = shift(%20, float[3, 3])
            return %21
        """,
    )


def test_a_row_with_one_live_entry_is_the_constant_one(check_pass: CheckPass) -> None:
    check_pass(
        LowerSoftmax(),
        lambda b, x: b.masked_softmax(x, torch.eye(3, dtype=torch.bool)),
        inputs=[S],
        before="""
            %0 = input()
            %1 = masked_softmax(%0, bool[3, 3], False)
            return %1
        """,
        after="""
            %0 = input()
            %1 = scale(%0, 0)
            %2 = shift(%1, float[3, 3])
            return %2
        """,
    )


def test_a_softmax_of_single_entries_weighs_by_constants(check_pass: CheckPass) -> None:
    """As of an attention of one token: no score is read, and what it makes is affine."""
    check_pass(
        LowerSoftmax(),
        lambda b, x: b.matmul(b.masked_softmax(x, torch.eye(3, dtype=torch.bool).flip(0)), x),
        inputs=[S],
        before="""
            %0 = input()
            %1 = masked_softmax(%0, bool[3, 3], False)
            %2 = matmul(%1, %0)
            return %2
        """,
        after="""
            %0 = input()
            %1 = permute(%0, [1, 0])
            %2 = linear(%1, float[3, 3])
            %3 = permute(%2, [1, 0])
            return %3
        """,
    )


def test_a_product_is_no_softmax(check_pass: CheckPass) -> None:
    check_pass(
        LowerSoftmax(),
        lambda b, x: b.mul(x, x),
        inputs=[S],
        before="""
            %0 = input()
            %1 = mul(%0, %0)
            return %1
        """,
    )

"""`sink-pairs`: only the pairs that are read are built."""

from __future__ import annotations

import torch

from fhe_fx.passes.sink_pairs import SinkPairs
from tests.conftest import CheckPass

X = torch.linspace(-1, 1, 6).view(2, 3)


def test_gathered_scores_become_products_of_gathered_rows(check_pass: CheckPass) -> None:
    check_pass(
        SinkPairs(),
        lambda b, x, y: b.take_pairs(
            b.matmul(x, b.transpose(y, 0, 1)), torch.tensor([1, 1]), torch.tensor([0, 1])
        ),
        inputs=[X, X + 1],
        before="""
            %0 = input()
            %1 = input()
            %2 = permute(%1, [1, 0])
            %3 = matmul(%0, %2)
            %4 = take_pairs(%3, [1 1], [0 1])
            return %4
        """,
        after="""
            %0 = input()
            %1 = input()
            %2 = permute(%1, [1, 0])
            %3 = index_select(%0, 0, [1 1])
            %4 = permute(%2, [1, 0])
            %5 = mul(%3, %4)
            %6 = sum(%5, [1], False)
            return %6
        """,
    )


def test_a_scattered_matrix_times_a_matrix_sums_its_pairs(check_pass: CheckPass) -> None:
    check_pass(
        SinkPairs(),
        lambda b, x, y: b.matmul(
            b.put_pairs(x, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2, 2), y
        ),
        inputs=[X[0], X],
        before="""
            %0 = input()
            %1 = input()
            %2 = put_pairs(%0, [0 1 1], [0 0 1], 2, 2)
            %3 = matmul(%2, %1)
            return %3
        """,
        after="""
            %0 = input()
            %1 = input()
            %2 = index_select(%1, 0, [0 0 1])
            %3 = reshape(%0, [3, 1])
            %4 = expand(%3, [3, 3])
            %5 = mul(%4, %2)
            %6 = index_select(%5, 0, 0)
            %7 = sum(%6, [0], True)
            %8 = index_select(%5, 0, [1 2])
            %9 = sum(%8, [0], True)
            %10 = cat([%7, %9], 0)
            return %10
        """,
    )


def test_a_matrix_that_is_returned_is_scattered_with_zeros(check_pass: CheckPass) -> None:
    check_pass(
        SinkPairs(),
        lambda b, x: b.put_pairs(x, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2, 2),
        inputs=[X[0]],
        before="""
            %0 = input()
            %1 = put_pairs(%0, [0 1 1], [0 0 1], 2, 2)
            return %1
        """,
        after="""
            %0 = input()
            %1 = index_select(%0, 0, 0)
            %2 = scale(%1, 0)
            %3 = cat([%0, %2], 0)
            %4 = index_select(%3, 0, [0 3 1 2])
            %5 = reshape(%4, [2, 2])
            return %5
        """,
    )


def test_a_product_of_whole_matrices_stays(check_pass: CheckPass) -> None:
    check_pass(
        SinkPairs(),
        lambda b, x, y: b.matmul(x, b.transpose(y, 0, 1)),
        inputs=[X, X + 1],
        before="""
            %0 = input()
            %1 = input()
            %2 = permute(%1, [1, 0])
            %3 = matmul(%0, %2)
            return %3
        """,
    )

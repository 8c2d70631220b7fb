"""`insert-refreshes`: no weights on top of long weighted sums."""

from __future__ import annotations

import torch

from fhe_fx.passes.insert_refreshes import InsertRefreshes
from tests.conftest import CheckPass

EXP = torch.ops.aten.exp.default


def test_a_long_sum_is_read_before_it_is_weighted_again(check_pass: CheckPass) -> None:
    check_pass(
        InsertRefreshes(),
        lambda b, x: b.linear(b.linear(b.apply(x, EXP), torch.ones(20, 16)), torch.ones(16, 2)),
        inputs=[torch.ones(2, 20)],
        before="""
            %0 = input()
            %1 = map[exp](%0)
            %2 = linear(%1, float[20, 16])
            %3 = linear(%2, float[16, 2])
            return %3
        """,
        after="""
            %0 = input()
            %1 = map[exp](%0)
            %2 = linear(%1, float[20, 16])
            %3 = map[](%2)
            %4 = linear(%3, float[16, 2])
            return %4
        """,
    )


def test_a_long_sum_is_returned_as_it_is(check_pass: CheckPass) -> None:
    check_pass(
        InsertRefreshes(),
        lambda b, x: b.linear(b.apply(x, EXP), torch.ones(20, 2)),
        inputs=[torch.ones(2, 20)],
        before="""
            %0 = input()
            %1 = map[exp](%0)
            %2 = linear(%1, float[20, 2])
            return %2
        """,
    )

"""`insert-refreshes`: no weights on top of long weighted sums."""

from __future__ import annotations

import torch

from fhe_fx.passes.insert_refreshes import InsertRefreshes
from tests.conftest import CheckPass

EXP = torch.ops.aten.exp.default
X = torch.linspace(-1, 1, 6).view(2, 3)
W = torch.arange(12.0).view(3, 4)


def test_a_long_sum_of_looked_up_values_is_read_before_it_is_returned(
    check_pass: CheckPass,
) -> None:
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
        after="""
            %0 = input()
            %1 = map[exp](%0)
            %2 = linear(%1, float[20, 2])
            %3 = map[](%2)
            return %3
        """,
    )


def test_a_short_sum_beside_look_ups_is_read_too(check_pass: CheckPass) -> None:
    check_pass(
        InsertRefreshes(),
        lambda b, x: b.linear(b.apply(x, EXP), W),
        inputs=[X],
        before="""
            %0 = input()
            %1 = map[exp](%0)
            %2 = linear(%1, float[3, 4])
            return %2
        """,
        after="""
            %0 = input()
            %1 = map[exp](%0)
            %2 = linear(%1, float[3, 4])
            %3 = map[](%2)
            return %3
        """,
    )


def test_a_sum_of_inputs_alone_is_returned_as_it_is(check_pass: CheckPass) -> None:
    check_pass(
        InsertRefreshes(),
        lambda b, x: b.linear(x, W),
        inputs=[X],
        before="""
            %0 = input()
            %1 = linear(%0, float[3, 4])
            return %1
        """,
    )

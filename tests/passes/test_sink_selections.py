"""`sink-selections`: what nobody reads is never computed."""

from __future__ import annotations

import torch

from fhe_fx.passes.sink_selections import SinkSelections
from tests.conftest import CheckPass

X = torch.linspace(-1, 1, 6).view(2, 3)
W = torch.arange(12.0).view(3, 4)


def test_a_selected_column_narrows_the_weights(check_pass: CheckPass) -> None:
    check_pass(
        SinkSelections(),
        lambda b, x: b.index_select(b.linear(x, W), 1, torch.tensor([1, 3])),
        inputs=[X],
        before="""
            %0 = input()
            %1 = linear(%0, float[3, 4])
            %2 = index_select(%1, 1, [1 3])
            return %2
        """,
        after="""
            %0 = input()
            %1 = linear(%0, float[3, 2])
            return %1
        """,
    )


def test_a_selection_goes_through_a_view_that_takes_a_dimension_apart(
    check_pass: CheckPass,
) -> None:
    check_pass(
        SinkSelections(),
        lambda b, x: b.index_select(b.view(b.linear(x, W), (2, 2, 2)), 1, torch.tensor([1])),
        inputs=[X],
        before="""
            %0 = input()
            %1 = linear(%0, float[3, 4])
            %2 = reshape(%1, [2, 2, 2])
            %3 = index_select(%2, 1, 1)
            return %3
        """,
        after="""
            %0 = input()
            %1 = linear(%0, float[3, 2])
            %2 = reshape(%1, [2, 1, 2])
            return %2
        """,
    )


def test_a_selection_that_repeats_rows_stays(check_pass: CheckPass) -> None:
    check_pass(
        SinkSelections(),
        lambda b, x: b.index_select(b.linear(x, W), 0, torch.tensor([0, 0])),
        inputs=[X],
        before="""
            %0 = input()
            %1 = linear(%0, float[3, 4])
            %2 = index_select(%1, 0, [0 0])
            return %2
        """,
    )

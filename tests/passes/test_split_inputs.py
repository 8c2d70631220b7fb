"""`split-inputs`: a ciphertext of its own for what goes into a result."""

from __future__ import annotations

import torch

from fhe_fx.passes.split_inputs import SplitInputs
from tests.conftest import CheckPass

EXP = torch.ops.aten.exp.default
X = torch.linspace(-1, 1, 6).view(2, 3)


def test_an_input_of_a_weighted_sum_and_of_a_result_is_sent_twice(check_pass: CheckPass) -> None:
    check_pass(
        SplitInputs(),
        lambda b, x: b.add(b.apply(b.linear(x, torch.eye(3)), EXP), x),
        inputs=[X],
        before="""
            %0 = input()
            %1 = linear(%0, float[3, 3])
            %2 = map[exp](%1)
            %3 = add(%2, %0)
            return %3
        """,
        after="""
            %0 = input()
            %1 = input()
            %2 = linear(%0, float[3, 3])
            %3 = map[exp](%2)
            %4 = add(%3, %1)
            return %4
        """,
    )


def test_readers_of_one_encoding_share_a_ciphertext(check_pass: CheckPass) -> None:
    check_pass(
        SplitInputs(),
        lambda b, x: b.add(b.scale(x, 0.3), x),
        inputs=[X],
        before="""
            %0 = input()
            %1 = scale(%0, 0.3)
            %2 = add(%1, %0)
            return %2
        """,
    )


def test_readers_that_end_in_look_ups_share_a_ciphertext_of_two_encodings(
    check_pass: CheckPass,
) -> None:
    check_pass(
        SplitInputs(),
        lambda b, x: b.add(
            b.apply(b.linear(x, torch.eye(3)), EXP), b.apply(b.linear(x, 2 * torch.eye(3)), EXP)
        ),
        inputs=[X],
        before="""
            %0 = input()
            %1 = linear(%0, float[3, 3])
            %2 = map[exp](%1)
            %3 = linear(%0, float[3, 3])
            %4 = map[exp](%3)
            %5 = add(%2, %4)
            return %5
        """,
    )


def test_an_input_that_is_weighted_and_added_is_sent_twice(check_pass: CheckPass) -> None:
    """One ciphertext would have one scale for both: that of the sum, coarse for the weights."""
    check_pass(
        SplitInputs(),
        lambda b, x: b.add(
            b.apply(b.linear(x, torch.eye(3)), EXP), b.apply(b.scale(b.add(x, x), 2.0), EXP)
        ),
        inputs=[X],
        before="""
            %0 = input()
            %1 = linear(%0, float[3, 3])
            %2 = map[exp](%1)
            %3 = add(%0, %0)
            %4 = scale(%3, 2)
            %5 = map[exp](%4)
            %6 = add(%2, %5)
            return %6
        """,
        after="""
            %0 = input()
            %1 = input()
            %2 = linear(%0, float[3, 3])
            %3 = map[exp](%2)
            %4 = add(%1, %1)
            %5 = scale(%4, 2)
            %6 = map[exp](%5)
            %7 = add(%3, %6)
            return %7
        """,
    )

"""`hoist-maps`: a function before its input is moved or repeated."""

from __future__ import annotations

import torch

from fhe_fx.ir import dialect as d
from fhe_fx.passes.hoist_maps import HoistMaps
from tests.conftest import CheckPass

EXP = torch.ops.aten.exp.default
X = torch.linspace(-1, 1, 6).view(2, 3)


def test_a_function_of_a_repeated_tensor_is_looked_up_once(check_pass: CheckPass) -> None:
    check_pass(
        HoistMaps(),
        lambda b, x: b.apply(b.expand(x, (4, 2, 3)), EXP),
        inputs=[X],
        before="""
            %0 = input()
            %1 = reshape(%0, [1, 2, 3])
            %2 = expand(%1, [4, 2, 3])
            %3 = map[exp](%2)
            return %3
        """,
        after="""
            %0 = input()
            %1 = map[exp](%0)
            %2 = reshape(%1, [1, 2, 3])
            %3 = expand(%2, [4, 2, 3])
            return %3
        """,
    )


def test_a_selection_that_drops_elements_stays_before(check_pass: CheckPass) -> None:
    check_pass(
        HoistMaps(),
        lambda b, x: b.apply(b.index_select(x, 1, torch.tensor([0])), EXP),
        inputs=[X],
        before="""
            %0 = input()
            %1 = index_select(%0, 1, 0)
            %2 = map[exp](%1)
            return %2
        """,
        notes=["index_select_default drops elements that would be looked up"],
    )


def test_a_function_that_differs_by_element_stays(check_pass: CheckPass) -> None:
    check_pass(
        HoistMaps(),
        lambda b, x: b.apply(b.view(x, (6,)), d.ADD, torch.arange(6.0)),
        inputs=[X],
        before="""
            %0 = input()
            %1 = reshape(%0, [6])
            %2 = map[add](%1)
            return %2
        """,
        notes=["its function differs from element to element"],
    )

"""`allot-bits`: a width for every look-up."""

from __future__ import annotations

import torch

from fhe_fx.passes.allot_bits import AllotBits
from tests.conftest import float_program

EXP = torch.ops.aten.exp.default
X = torch.linspace(-1, 1, 6).view(2, 3)


def test_look_ups_read_two_bits_more_than_an_activation_has() -> None:
    program = float_program(lambda b, x: b.apply(x, EXP), [X])
    assert AllotBits().run(program) is False
    assert program.maps()[0].meta["lookup_bits"] == program.options.n_bits + 2


def test_a_width_chosen_before_is_kept() -> None:
    program = float_program(lambda b, x: b.apply(x, EXP), [X])
    program.maps()[0].meta["lookup_bits"] = 9
    AllotBits().run(program)
    assert program.maps()[0].meta["lookup_bits"] == 9

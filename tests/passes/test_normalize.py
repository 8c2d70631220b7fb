"""`normalize`: few operators, constants folded, everything unsupported named at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fhe_fx
from fhe_fx.errors import UnsupportedOpError
from fhe_fx.passes.lowerings import LOWERINGS
from fhe_fx.passes.normalize import Normalize
from tests.conftest import statements
from tests.programs import program_from, seeded

SAMPLES = [(x,) for x in seeded((2, 4))]


def test_views_become_structure_and_clear_operands_constants() -> None:
    program = program_from(lambda x: x.unsqueeze(0).transpose(1, 2) * 2 + 1, SAMPLES)
    assert Normalize().run(program) is True
    assert statements(program) == "\n".join(
        [
            "%0 = input()",
            "%1 = reshape(%0, [1, 2, 4])",
            "%2 = permute(%1, [0, 2, 1])",
            "%3 = scale(%2, 2)",
            "%4 = shift(%3, 1)",
            "return %4",
        ]
    )


def test_a_causal_mask_becomes_the_live_entries_of_a_softmax() -> None:
    mask = torch.ones(2, 4, dtype=torch.bool).tril()
    program = program_from(lambda x: x.masked_fill(~mask, -1e9).softmax(-1), SAMPLES)
    Normalize().run(program)
    program.clean()
    assert statements(program).splitlines()[1:] == [
        "%1 = masked_softmax(%0, bool[2, 4], False)",
        "return %1",
    ]


def test_refuses_all_unsupported_operators_at_once() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.median(torch.sort(x, -1).values, -1).values

    program = program_from(function, SAMPLES)
    with pytest.raises(UnsupportedOpError) as error:
        Normalize().run(program)
    text = str(error.value)
    assert text.startswith(
        "region: 2 operator(s) cannot run on encrypted data.\n  aten.sort.default"
    )
    assert "aten.median.dim" in text
    assert "programs.py:" in text
    assert text.endswith(
        "Encrypt a submodule without them, or register a lowering for each: "
        "@fhe_fx.register_lowering(torch.ops.aten.<name>) (docs/writing_a_pass.md)."
    )


def test_a_registered_lowering_is_used() -> None:
    op = torch.ops.aten.i0.default

    @fhe_fx.register_lowering(op)
    def i0(b: object, x: object) -> object:
        return b.apply(x, op)  # type: ignore[attr-defined]

    try:
        program = program_from(lambda x: torch.i0(x), SAMPLES)
        Normalize().run(program)
        assert "map[i0](%0)" in statements(program)
    finally:
        del LOWERINGS[op]

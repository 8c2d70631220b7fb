"""`fuse-linears`: one product with composed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fhe_fx.ir import Program
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR, SCALE
from fhe_fx.passes import Pipeline
from fhe_fx.passes.fuse_linears import FuseLinears
from fhe_fx.passes.normalize import Normalize
from tests.programs import assert_close, program_from, run_all, seeded

SAMPLES = [(x,) for x in seeded((1, 3, 4))]


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 2), nn.Linear(2, 6)
        self.angles = torch.rand(3, 2)

    def rotated(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, -1)
        cos, sin = self.angles[:, :1].cos(), self.angles[:, 1:].sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class _InARow(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).transpose(1, 2).transpose(1, 2) * 2).tanh()
        return result


class _Rotary(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.rotated(x).tanh()


class _Residual(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (x + self.second(self.first(x))[..., :4]).tanh()
        return result


class _Mixed(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x) + self.first(x).sum(1, keepdim=True))
        return result.tanh()


def _fused(module: nn.Module) -> Program:
    program = program_from(module, SAMPLES)
    Pipeline((Normalize(),)).run(program)
    expected = run_all(program, SAMPLES)
    Pipeline((FuseLinears(),)).run(program)
    assert_close(expected, run_all(program, SAMPLES), "fuse-linears")
    return program


def test_two_products_in_a_row_are_one() -> None:
    program = _fused(_InARow())
    (linear,) = program.calls(LINEAR)
    assert d.shape_of(linear.args[1]) == (4, 6)  # type: ignore[arg-type]
    assert not program.calls(SCALE)


def test_rows_get_their_own_weights_where_the_position_counts() -> None:
    program = _fused(_Rotary())
    (linear,) = program.calls(LINEAR)
    assert d.shape_of(linear.args[1]) == (3, 4, 2)  # type: ignore[arg-type]
    assert not program.calls(SCALE, d.ADD, d.SUB, d.CAT)


def test_a_residual_is_not_pressed_into_weights() -> None:
    program = _fused(_Residual())
    assert len(program.calls(LINEAR)) == 2
    assert [n.reason for n in program.notes] == ["part of it is not multiplied by clear weights"]


def test_a_sum_over_rows_stays() -> None:
    program = _fused(_Mixed())
    assert len(program.calls(LINEAR)) >= 2
    assert "it mixes rows" in {n.reason for n in program.notes}


def test_a_single_product_is_left_alone() -> None:
    program = program_from(nn.Linear(4, 2), SAMPLES)
    Pipeline((Normalize(),)).run(program)
    assert FuseLinears().run(program) is False

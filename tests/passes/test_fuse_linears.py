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


class _Heads(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(3, 2, 2).transpose(0, 1)  # [heads, positions, channels]
        mixed = (heads @ self.first.weight[:, :2].T).transpose(0, 1).reshape(1, 3, 4)
        result: Tensor = self.second(mixed[..., :2] + mixed[..., 2:]).tanh()
        return result


class _Beside(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x) + x[..., :2].exp()).tanh()
        return result


class _Cancelled(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.tensor([[1.0, -1, 0], [0, 0, 0], [-1, 1, 0]]) @ (self.first(x) * 0.0)
        result: Tensor = (mixed @ self.second.weight.T).tanh()
        return result


class _Causal(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        mean = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
        result: Tensor = self.second(mean @ self.first(x)).tanh()
        return result


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


def test_a_sum_over_rows_is_a_product_of_all_rows() -> None:
    program = _fused(_Mixed())
    (linear,) = program.calls(LINEAR)
    assert d.shape_of(linear.args[1]) == (3 * 4, 3 * 6)  # type: ignore[arg-type]


def test_rows_that_are_mixed_alike_share_their_weights() -> None:
    """What one position makes of two heads is made of each position by the same product."""
    program = _fused(_Heads())
    (linear,) = program.calls(LINEAR)
    assert d.shape_of(linear) == (3, 6)
    assert d.shape_of(linear.args[1]) == (4, 6)  # type: ignore[arg-type]


def test_tensors_that_are_weighted_before_get_products_of_their_own() -> None:
    program = _fused(_Beside())
    assert [n.args[0].target for n in program.calls(LINEAR)].count(LINEAR) == 0  # type: ignore[union-attr]
    assert len(program.calls(LINEAR)) == 2


def test_later_positions_read_those_before_them() -> None:
    program = _fused(_Causal())
    rows = sorted(d.shape_of(n)[-1] // 4 for n in map(d.input_node, program.calls(LINEAR)))
    assert rows == [1, 2, 3]


def test_a_single_product_is_left_alone() -> None:
    program = program_from(nn.Linear(4, 2), SAMPLES)
    Pipeline((Normalize(),)).run(program)
    assert FuseLinears().run(program) is False


def test_what_depends_on_no_row_is_zero_and_its_constant() -> None:
    """Weights that cancel leave nothing to multiply."""
    program = _fused(_Cancelled())
    assert_close([torch.zeros(1)], [program(*SAMPLES[0])[0].std()[None]], "fuse-linears")

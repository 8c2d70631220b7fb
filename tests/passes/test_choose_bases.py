"""`choose-bases`: encrypted matrices contracted over few channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fhe_fx.ir import Program
from fhe_fx.ir import dialect as d
from fhe_fx.passes import Pass, Pipeline
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.passes.choose_bases import ChooseBases
from fhe_fx.passes.normalize import Normalize
from tests.programs import program_from, relative_error, run_all, seeded

CHANNELS, RANK = 8, 3
SAMPLES = [(x,) for x in seeded((1, 4, 12), n=64)]
UNSEEN = [(x,) for x in seeded((1, 4, 12), n=64, seed=1)]


class _Scores(nn.Module):
    """Scores of queries and keys that share few directions."""

    def __init__(self, rank: int = RANK) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = (nn.Linear(12, CHANNELS) for _ in range(2))
        self.mix = nn.Linear(rank, CHANNELS, bias=False)
        self.few = nn.Linear(12, rank)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.q(x) @ self.mix(self.few(x)).transpose(-2, -1)
        return scores


class _Normalized(_Scores):
    """The same behind the weights of a normalization."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x) * torch.linspace(0.5, 1.5, 12) + 0.1)


class _Unweighted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.transpose(-2, -1)


def _program(module: nn.Module, *passes: Pass, n_bits: int = 6) -> Program:
    program = program_from(module, SAMPLES, n_bits=n_bits)
    Pipeline((Normalize(), Calibrate(), *passes)).run(program)
    return program


def _rank(program: Program) -> int:
    (product,) = program.calls(d.MATMUL)
    return d.shape_of(product.args[0])[-1]  # type: ignore[arg-type]


def test_channels_that_do_not_contribute_are_left_out() -> None:
    module = _Scores()
    program = _program(module, ChooseBases())
    assert _rank(program) <= RANK
    expected = run_all(_program(module), UNSEEN)
    error = relative_error(expected[0], run_all(program, UNSEEN)[0])
    # The tolerance holds on samples; others of the same kind are within twice that.
    assert error <= 2 * ChooseBases().tolerance * 2.0**-6


def test_factors_in_front_of_the_weights_are_no_obstacle() -> None:
    assert _rank(_program(_Normalized(), ChooseBases())) <= RANK


def test_more_bits_keep_more_channels() -> None:
    module = _Scores(rank=CHANNELS)
    ranks = [_rank(_program(module, ChooseBases(), n_bits=n)) for n in (1, 4, 12)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] == CHANNELS


def test_channels_that_save_more_than_they_cost_are_kept() -> None:
    """Of two that the tolerance could do without, one more takes most of the error away."""
    module = _Scores(rank=CHANNELS)
    by_tolerance, by_price = (
        _program(module, ChooseBases(tolerance=8.0, exchange=exchange), n_bits=4)
        for exchange in (0.0, 1.0)
    )
    expected = run_all(_program(module), UNSEEN)[0]
    errors = [relative_error(expected, run_all(p, UNSEEN)[0]) for p in (by_tolerance, by_price)]
    assert _rank(by_tolerance) < _rank(by_price) < CHANNELS
    assert errors[1] < errors[0] / 2


def test_a_budget_below_float_rounding_keeps_all_channels() -> None:
    program = program_from(_Scores(rank=CHANNELS), SAMPLES, max_error=1e-12)
    Pipeline((Normalize(), Calibrate(), ChooseBases())).run(program)
    assert _rank(program) == CHANNELS


def test_kept_channels_vary_alike() -> None:
    program = _program(_Scores(), ChooseBases())
    (product,) = program.calls(d.MATMUL)
    left, right = (program.values(SAMPLES)[n.name] for n in d.operands(product))
    energy = left.var((0, -2)).sum(0) + right.mT.var((0, -2)).sum(0)
    torch.testing.assert_close(energy, energy.mean().expand_as(energy), rtol=0.02, atol=0)


def test_operands_without_weights_are_left_alone() -> None:
    program = _program(_Unweighted())
    assert ChooseBases().run(program) is False
    assert [n.reason for n in program.notes] == [
        "no weights carry a basis of an operand: part of it is not multiplied by clear weights"
    ]

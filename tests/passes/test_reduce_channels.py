"""`reduce-channels`: few channels between clear weights on both sides of an encrypted product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fhe_fx.ir import Program
from fhe_fx.ir import dialect as d
from fhe_fx.ir.chains import AffineChain
from fhe_fx.ir.ops import LINEAR, LOOKUP
from fhe_fx.passes import Pass, Pipeline, default_pipeline
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.passes.fuse_linears import FuseLinears
from fhe_fx.passes.normalize import Normalize
from fhe_fx.passes.reduce_channels import ReduceChannels
from tests.programs import (
    assert_close,
    lower,
    program_from,
    relative_error,
    run_all,
    run_integers,
    seeded,
)

TOKENS, WIDTH, HEADS, CHANNELS = 4, 12, 2, 6
SAMPLES = [(x,) for x in seeded((1, TOKENS, WIDTH), n=64)]
UNSEEN = [(x,) for x in seeded((1, TOKENS, WIDTH), n=64, seed=1)]


class _Attention(nn.Module):
    """Weights that vary by `steepness` about their mean, values, and an output projection."""

    def __init__(self, steepness: float = 1.0, rank: int = CHANNELS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steepness = steepness
        self.mixing = nn.Linear(WIDTH, HEADS * TOKENS)
        self.values = nn.Linear(WIDTH, HEADS * CHANNELS)
        self.few = nn.Linear(CHANNELS, rank, bias=False)
        self.more = nn.Linear(rank, CHANNELS, bias=False)
        self.out = nn.Linear(HEADS * CHANNELS, WIDTH)

    def summed(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.steepness * self.mixing(x))
        p = p.view(1, TOKENS, HEADS, TOKENS).transpose(1, 2)
        v = self.values(x).view(1, TOKENS, HEADS, CHANNELS).transpose(1, 2)
        if self.few.out_features < CHANNELS:
            v = self.more(self.few(v))
        summed: Tensor = (p @ v).transpose(1, 2).reshape(1, TOKENS, HEADS * CHANNELS)
        return summed

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.out(self.summed(x))
        return projected


class _Bare(_Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.summed(x)


class _AlsoRead(_Attention):
    def forward(self, x: Tensor) -> Tensor:
        summed = self.summed(x)
        return torch.cat([self.out(summed), summed], -1)


def _program(module: nn.Module, *passes: Pass, n_bits: int = 4, **options: float) -> Program:
    program = program_from(module, SAMPLES, n_bits=n_bits, **options)
    Pipeline((Normalize(), Calibrate(), *passes)).run(program)
    return program


def _rank(program: Program) -> int:
    found = program.calls(d.MATMUL)
    return d.shape_of(found[0])[-1] if found else 0


def test_channels_without_effect_are_left_out_and_nothing_changes() -> None:
    module = _Attention(rank=2)
    program = _program(module, ReduceChannels(), n_bits=10)
    assert _rank(program) == 2
    assert_close(run_all(_program(module), UNSEEN), run_all(program, UNSEEN), "reduce-channels")


def test_the_less_weights_vary_the_fewer_channels_are_kept() -> None:
    ranks = [_rank(_program(_Attention(s), ReduceChannels())) for s in (0.0, 0.3, 2.0)]
    assert ranks == sorted(ranks)
    assert ranks[0] == 2  # the mean is all there is
    assert 2 < ranks[1] < ranks[2] <= CHANNELS


def test_results_err_on_unseen_inputs_by_what_was_written_down() -> None:
    module = _Attention(0.5)
    program = _program(module, ReduceChannels())
    assert _rank(program) < CHANNELS
    error = relative_error(run_all(_program(module), UNSEEN)[0], run_all(program, UNSEEN)[0])
    assert program.left_out**0.5 / 1.5 < error < 1.5 * program.left_out**0.5
    allowed = ReduceChannels().usual_error * 2.0**-4
    assert program.left_out <= ReduceChannels().most * allowed**2


@pytest.mark.parametrize("finer", [{"n_bits": 8}, {"max_error": 0.01}])
def test_a_smaller_error_keeps_more_channels(finer: dict[str, float]) -> None:
    coarse = _program(_Attention(0.5), ReduceChannels())
    fine = _program(_Attention(0.5), ReduceChannels(), **finer)  # type: ignore[arg-type]
    assert _rank(coarse) < _rank(fine)
    assert fine.left_out < coarse.left_out


@pytest.mark.parametrize("module", [_Bare(), _AlsoRead()])
def test_without_weights_behind_it_a_product_stays_as_it_is(module: nn.Module) -> None:
    program = _program(module)
    assert ReduceChannels().run(program) is False
    (note,) = program.notes
    assert "more than clear weights read it" in note.reason


def test_weights_on_both_sides_carry_the_basis() -> None:
    module = _Attention(0.5)
    program = _program(module, ReduceChannels(), FuseLinears())
    for node in program.calls(LINEAR):
        assert sum(d.is_call(n, LINEAR) for n in AffineChain.of(node).nodes) == 1
    expected = run_all(_program(module, ReduceChannels()), UNSEEN)
    assert_close(expected, run_all(program, UNSEEN), "fuse-linears")


def test_lowered_it_takes_fewer_look_ups_and_errs_little_more() -> None:
    look_ups, errors = [], []
    for has_pass in (False, True):
        program = program_from(_Attention(0.3), SAMPLES, n_bits=4)
        kept = [p for p in default_pipeline() if has_pass or not isinstance(p, ReduceChannels)]
        expected = lower(program, passes=Pipeline(tuple(kept)))
        look_ups.append(sum(n.meta["val"].numel() for n in program.calls(LOOKUP)))
        errors.append(relative_error(expected[0], run_integers(program, SAMPLES)[0]))
    assert look_ups[1] < 0.9 * look_ups[0]
    assert errors[1] < (errors[0] ** 2 + ReduceChannels().usual_error ** 2 * 4.0**-4) ** 0.5

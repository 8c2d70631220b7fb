"""Predicted overflow against what inputs that calibration never saw do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, fx

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.backends.reference.batch import run_batch
from fhe_fx.ir import Program
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.types import ValueType
from fhe_fx.ir.views import Lookup
from fhe_fx.passes import Pipeline, default_pipeline
from fhe_fx.passes.choose_ranges import ChooseRanges
from fhe_fx.passes.lower_to_integers import LowerToIntegers
from fhe_fx.quant.lookup_noise import LookupNoise
from fhe_fx.quant.noise import noise_in_slots
from fhe_fx.quant.overflow import Overflow
from fhe_fx.runtime.ranges import wraps
from tests.models import shipped_gpt2, shipped_sentences
from tests.programs import Sample, encode, program_from, seeded

ROWS, CHANNELS, CALIBRATED, HELD_OUT = 2, 24, 64, 256
CHANCE = 0.001
"""Of a right prediction to fail the test."""
W = torch.linalg.qr(torch.randn((CHANNELS, CHANNELS), generator=torch.Generator().manual_seed(5)))


def _tanh(x: Tensor) -> Tensor:
    return torch.tanh(x @ W.Q)


def _square(x: Tensor) -> Tensor:
    return torch.square(x @ W.Q)


def _pipeline(ranges: ChooseRanges | None = None) -> Pipeline:
    pipeline = default_pipeline()
    return Pipeline(tuple(ranges if ranges and p.name == ranges.name else p for p in pipeline))


def _lowered(
    function: Callable[[Tensor], Tensor], ranges: ChooseRanges | None = None, seed: int = 1
) -> Program:
    """Lower a function of independent normal values, so that those outside are, too."""
    samples = [(x,) for x in seeded((ROWS, CHANNELS), n=CALIBRATED, seed=seed)]
    program = program_from(function, samples, n_bits=4)
    _pipeline(ranges).run(program)
    return program


def _said(node: fx.Node, key: str = "overflow") -> Overflow:
    return Overflow(**json.loads(node.meta[key]))


@dataclasses.dataclass(frozen=True)
class _CountingNoise(LookupNoise):
    """Keeps what look-ups read."""

    read: list[Tensor] = dataclasses.field(default_factory=list)

    def disturb(self, x: Tensor, bits: int, lsbs: int) -> Tensor:
        self.read.append(super().disturb(x, bits, lsbs))
        return self.read[-1]


def _observed(program: Program, samples: Sequence[Sample]) -> dict[str, tuple[Tensor, ...]]:
    """Return for each look-up the share outside in each sample, with its noise and without."""
    before: dict[str, Tensor] = {}
    noise = _CountingNoise(
        noise_in_slots(program.options.chosen_p_error), torch.Generator().manual_seed(9)
    )
    run_batch(
        program,
        _encoded(program, samples),
        noise=noise,
        observe=lambda n, x: before.__setitem__(n.name, x),
    )
    views = {n.name: Lookup.of(n) for n in program.calls(LOOKUP)}
    return {
        name: tuple(wraps(views[name], v).double().flatten(1).mean(1) for v in (read, x))
        for (name, x), read in zip(before.items(), noise.read, strict=True)
    }


def _agree(predicted: float, n: int, observed: float, n_observed: int) -> bool:
    """Compare two shares of independent values by the exact test of one rate for both."""
    expected, seen = round(predicted * n), round(observed * n_observed)
    if expected + seen == 0:
        return True
    test = binomtest(seen, expected + seen, n_observed / (n + n_observed))
    return bool(test.pvalue > CHANCE)


@pytest.mark.parametrize("function", [_tanh, _square])
def test_the_predicted_rate_is_observed_on_new_inputs(function: Callable[[Tensor], Tensor]) -> None:
    # Without room, so that enough lies outside to be counted.
    program = _lowered(function, ChooseRanges(rooms=(0.0,), room=0.0))
    new = [(x,) for x in seeded((ROWS, CHANNELS), n=HELD_OUT, seed=2)]
    (node,) = program.calls(LOOKUP)
    said, (noisy, quiet) = _said(node), _observed(program, new)[node.name]
    assert said.n_values == CALIBRATED * ROWS * CHANNELS
    n_new = HELD_OUT * ROWS * CHANNELS
    assert said.is_seen, "the test shows nothing"
    assert _agree(said.probability, said.n_values, float(noisy.mean()), n_new)
    assert _agree(said.values_outside, said.n_values, float(quiet.mean()), n_new)
    assert float(noisy.mean()) < said.probability_at_most
    (place,) = program.placeholders
    clipped = torch.stack([_is_clipped(place, x) for (x,) in new]).double().mean()
    assert _agree(_said(place).probability, said.n_values, float(clipped), n_new)


def _is_clipped(place: fx.Node, x: Tensor) -> Tensor:
    t: ValueType = place.meta["type"]
    whole = ((x.double() - t.offset) / t.scale).round()
    return (whole < t.low) | (whole > t.high)


def test_the_prediction_follows_a_range_that_is_cut_or_widened() -> None:
    new = [(x,) for x in seeded((ROWS, CHANNELS), n=HELD_OUT, seed=2)]
    rates, errors = [], []
    for room in (-0.2, -0.1, 0.0, 0.4):
        program = _lowered(_tanh, ChooseRanges(rooms=(room,), room=room))
        (node,) = program.calls(LOOKUP)
        said = _said(node)
        noisy = float(_observed(program, new)[node.name][0].mean())
        assert _agree(said.probability, said.n_values, noisy, HELD_OUT * ROWS * CHANNELS), room
        rates.append(said.probability)
        errors.append(said.result_error or 0.0)
    assert rates[0] > 2 * rates[1] > 4 * rates[2] > 8 * rates[3]
    assert errors == sorted(errors, reverse=True)


def test_noise_alone_is_predicted_where_no_value_passes_an_end() -> None:
    # A step's two values lie at the ends of the range; only noise leads beyond them.
    samples = [(x,) for x in seeded((ROWS, CHANNELS), n=CALIBRATED, seed=1)]
    program = program_from(lambda x: torch.tanh(torch.sign(x)[:, :12] + 0.0), samples, n_bits=4)
    ranges = ChooseRanges(rooms=(0.0,), room=0.0)
    _pipeline(ranges).run(program)
    new = [(x,) for x in seeded((ROWS, CHANNELS), n=HELD_OUT, seed=2)]
    for name, (noisy, _) in _observed(program, new).items():
        (node,) = (n for n in program.calls(LOOKUP) if n.name == name)
        said = _said(node)
        assert _agree(said.probability, said.n_values, float(noisy.mean()), HELD_OUT * ROWS * 12)


def test_the_predicted_error_is_the_one_that_wrapping_makes() -> None:
    """Few calibration values decide it, so it is compared as a mean over several calibrations."""
    new = [(x,) for x in seeded((ROWS, CHANNELS), n=HELD_OUT, seed=2)]
    exact = torch.stack([_tanh(x) for (x,) in new])
    size, deviation = float(exact.square().mean().sqrt()), float(exact.std())
    said, found = [], []
    for seed in (1, 11, 21, 31):
        program = _lowered(_tanh, ChooseRanges(rooms=(-0.1,), room=-0.1), seed)
        (node,) = program.calls(LOOKUP)
        overflow, t = _said(node), node.meta["type"]
        is_outside, answer = _wrapped(program, node, new)
        wrong = (answer * t.scale + t.offset - exact)[is_outside].square()
        said.append(((overflow.error or 0.0) ** 2, (overflow.result_error or 0.0) ** 2))
        found.append((wrong.mean() / size**2, wrong.sum() / is_outside.numel() / deviation**2))
    expected = torch.tensor(found).double().mean(0).sqrt()
    torch.testing.assert_close(
        torch.tensor(said).double().mean(0).sqrt(), expected, rtol=0.2, atol=0
    )


def _wrapped(program: Program, node: fx.Node, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return which values of the only look-up are outside without noise, and all its answers."""
    is_outside: list[Tensor] = []
    answers: list[Tensor] = []
    run_batch(
        program,
        _encoded(program, samples),
        observe=lambda n, x: is_outside.append(wraps(Lookup.of(n), x)),
        record=lambda n, x: answers.append(x) if n is node else None,
    )
    return torch.cat(is_outside), torch.cat(answers)


def _encoded(program: Program, samples: Sequence[Sample]) -> list[Tensor]:
    encoded = [map(torch.from_numpy, encode(program, s)) for s in samples]
    return [torch.stack(place) for place in zip(*encoded, strict=True)]


def test_a_head_of_a_trained_model_meets_its_prediction() -> None:
    """Values of one text hang together, so the bound is by the spread between texts."""
    texts = [s[:, :4] for s in shipped_sentences() if s.shape[1] >= 4]
    model = fhe_fx.encrypt_submodule(
        shipped_gpt2(1), "h.0.attn", heads=[0], max_tokens=4, calibration=texts[:64]
    )
    (found,) = fhe_fx.inspect(model, texts[64:128], mode="simulate")
    program = encrypted_modules(model)[0].region.program
    n_seen = 0
    for row in found.nodes:
        if not row.look_ups:
            continue
        (node,) = (n for n in program.calls(LOOKUP) if n.name == row.node)
        said = _said(node)
        assert row.expected_outside == said.values_outside
        deviation = said.probability_at_most - said.probability  # 1.6 of them, and unseen values
        assert abs(row.outside_share - said.values_outside) < 2.8 * deviation, row.operator
        n_seen += said.is_seen and row.outside > 0
    assert n_seen >= 2, "the test shows nothing"


def test_nothing_is_estimated_where_it_is_not_wanted() -> None:
    samples = [(x,) for x in seeded((1, 4), n=4)]
    program = program_from(torch.tanh, samples)
    *passes, _ = default_pipeline()
    Pipeline((*passes, LowerToIntegers(estimates_overflow=False))).run(program)
    assert not any("overflow" in n.meta for n in program.encrypted())

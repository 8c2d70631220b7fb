"""The reference on many samples equals the reference on one; its noise is Concrete's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.backends.concrete import ConcreteBackend
from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.backends.reference.batch import run_batch
from fhe_fx.ir import Program
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.passes import Pipeline, default_pipeline
from fhe_fx.passes.allot_bits import AllotBits
from fhe_fx.quant.lookup_noise import LookupNoise
from fhe_fx.testing.strategies import Recipe, recipes
from tests.models import FEW, shipped_gpt2, shipped_sentences, tiny_llama
from tests.passes.test_random_graphs import QUICK
from tests.programs import decode, encode, lower, program_from, run_all, seeded


def _stacked(samples: list[list[Any]]) -> list[Tensor]:
    return [torch.from_numpy(np.stack(x)) for x in zip(*samples, strict=True)]


def _assert_equal_one_by_one(program: Program, gains: tuple[float, ...] = (1.0, 8.0)) -> None:
    samples = [encode(program, s, gain) for gain in gains for s in program.samples[:5]]
    circuit = ReferenceBackend().compile(program)
    many = circuit.clear_many(samples)
    assert len(many) == len(samples)
    for sample, found in zip(samples, many, strict=True):
        for a, b in zip(circuit.clear(sample), found, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@settings(QUICK, max_examples=15)
@given(recipes())
def test_many_samples_give_the_integers_of_each(recipe: Recipe) -> None:
    program = program_from(recipe, recipe.samples(), n_bits=4)
    lower(program)
    _assert_equal_one_by_one(program)  # in range, and wrapped


@settings(QUICK, max_examples=10)
@given(recipes())
def test_many_samples_of_the_float_program_give_the_values_of_each(recipe: Recipe) -> None:
    program = program_from(recipe, recipe.samples(), n_bits=4)
    default_pipeline().drop("lower-to-integers").run(program)
    inputs = [
        torch.stack([s[program.source_of(n)] for s in program.samples])
        for n in program.placeholders
    ]
    for a, b in zip(run_all(program, program.samples), run_batch(program, inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "target", "heads"),
    [
        (shipped_gpt2, "h.0.attn", [1]),
        (shipped_gpt2, "h.0", None),
        (tiny_llama, "layers.0.self_attn", None),
    ],
)
def test_many_sentences_give_the_integers_of_each(
    make: Callable[[], Any], target: str, heads: list[int] | None
) -> None:
    encrypted = fhe_fx.encrypt_submodule(make(), target, max_tokens=3, heads=heads, options=FEW)
    (module,) = encrypted_modules(encrypted)
    _assert_equal_one_by_one(module.region.program, (1.0, 2.0))


def test_a_batch_in_clear_mode_is_each_sentence_alone() -> None:
    encrypted = fhe_fx.encrypt_submodule(shipped_gpt2(), "h.0.attn", max_tokens=4, options=FEW)
    fhe_fx.set_mode(encrypted, "clear")
    module = encrypted.transformer.h[0].attn
    ids = torch.cat([row[:, :4] for row in shipped_sentences()[:6]])
    hidden = shipped_gpt2().transformer.wte(ids)
    with torch.no_grad():
        together = module(hidden)[0]
        alone = torch.cat([module(row[None])[0] for row in hidden])
    # The circuit gives the same integers; the client's float parts run alone either way.
    assert torch.equal(together, alone)


# Noise ----------------------------------------------------------------------------------------

SIDE, RUNS = 32, 4


def _table(p_error: float, n_bits: int) -> tuple[Program, list[list[Any]]]:
    samples = [(x,) for x in seeded((1, SIDE, SIDE), n=RUNS)]
    program = program_from(torch.tanh, samples, n_bits=n_bits)
    program.options = dataclasses.replace(program.options, p_error=p_error)
    lower(program)
    assert len(program.calls(LOOKUP)) == 1
    return program, [encode(program, s) for s in samples]


@pytest.mark.parametrize(("p_error", "n_bits"), [(0.3, 4), (0.1, 4), (0.01, 2)])
def test_noise_is_that_of_concretes_simulation(p_error: float, n_bits: int) -> None:
    """How often a look-up reads another entry, anywhere in its slot, and how far off it is then.

    Rates of n look-ups have a standard deviation of sqrt(r (1 - r) / n) each. Five deviations of
    their difference are allowed: chance exceeds them once in two million runs.
    """
    program, encoded = _table(p_error, n_bits)
    circuit = ConcreteBackend().compile(program)
    clear = run_batch(program, _stacked(encoded))[0].numpy()
    theirs = np.stack([circuit.simulate(inputs)[0] for inputs in encoded]) != clear
    # What a table answers is returned as it is, with next to no noise.
    noise = dataclasses.replace(
        LookupNoise.of(circuit.facts.p_error, seed=1), reaches_results=False
    )
    ours = run_batch(program, _stacked(encoded), noise=noise)[0].numpy() != clear
    rate = (theirs.mean() + ours.mean()) / 2
    allowed = 5 * math.sqrt(2 * rate * (1 - rate) / ours.size)
    assert abs(ours.mean() - theirs.mean()) < allowed
    assert rate > p_error  # off the middle of a slot, less noise is enough


@pytest.mark.parametrize("p_error", [0.4, 0.1, 0.01])
@pytest.mark.parametrize("lsbs", [0, 5])
def test_in_the_middle_of_a_slot_it_errs_as_often_as_stated(p_error: float, lsbs: int) -> None:
    n = 100_000
    x = torch.zeros(n, dtype=torch.int64)
    noisy = LookupNoise.of(p_error).disturb(x, bits=6, lsbs=lsbs)
    read = (noisy + (1 << lsbs - 1) >> lsbs) if lsbs else noisy
    found = float((read != 0).float().mean())
    # Noise is rounded to an accumulator's unit, which moves the border by half of one: with s
    # slots of deviation, by at most the density at the border times that.
    border = 0.0 if lsbs == 0 else 2 * 0.4 / LookupNoise.of(p_error).deviation / (1 << lsbs) / 2
    assert abs(found - p_error) < 5 * math.sqrt(p_error * (1 - p_error) / n) + border


@pytest.mark.parametrize("lsbs", [0, 1, 4])
def test_saturating_noise_pushes_nothing_past_the_ends(lsbs: int) -> None:
    bits = 3
    half = 1 << bits - 1
    inside = [v for v in range(-200, 200) if -half <= ((v + (1 << lsbs) // 2) >> lsbs) < half]
    x = torch.tensor(inside).repeat(50)
    noise = LookupNoise.of(0.4, saturates=True)
    read = (noise.disturb(x, bits, lsbs) + (1 << lsbs) // 2) >> lsbs
    assert int(read.min()) == -half
    assert int(read.max()) == half - 1
    # A value that was outside stays outside or comes back; noise does not push it further.
    outside = torch.full((500,), (half << lsbs) + 3)
    assert int(noise.disturb(outside, bits, lsbs).max()) <= int(outside[0])


def _read(readings: int) -> tuple[Program, Tensor]:
    """Look up 192 products with weights so many times, with noise that dwarfs roundings."""
    samples = [(x,) for x in seeded((1, 16, 12), n=32)]
    weight = seeded((12, 12), n=1, seed=2)[0]
    program = program_from(lambda x: torch.tanh(x @ weight / 4), samples, n_bits=4)
    (expected,) = run_all(program, samples)
    passes = tuple(default_pipeline())
    place = [p.name for p in passes].index(AllotBits.name) + 1
    Pipeline(passes[:place]).run(program)
    (node,) = program.maps()
    node.meta["lookup_bits"], node.meta["readings"] = 8, readings
    program.options = dataclasses.replace(program.options, p_error=0.65)
    Pipeline(passes[place:]).run(program)
    assert len(program.calls(LOOKUP)) == readings + (readings > 1)  # one is an encrypted zero
    return program, expected


def test_readings_of_a_value_err_independently_under_encryption() -> None:
    """The mean of four errs by half of what one does; were the noise the same, by as much."""
    errors = {}
    for readings in (1, 4):
        program, expected = _read(readings)
        circuit = ConcreteBackend().compile(program)
        inputs = encode(program, program.samples[0])
        (found,) = decode(program, circuit.execute(inputs))
        errors[readings] = float((found - expected[0]).square().mean().sqrt())
    # Of 192 errors the deviation has one of 5 % itself: 0.5 is met within five.
    assert 0.35 < errors[4] / errors[1] < 0.68


def test_noise_of_one_seed_is_the_same_again() -> None:
    x = torch.arange(1000)
    first, second = (LookupNoise.of(0.1, seed=3).disturb(x, 6, 4) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, LookupNoise.of(0.1, seed=4).disturb(x, 6, 4))

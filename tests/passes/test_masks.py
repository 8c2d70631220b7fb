"""`masks`: encrypted zeros are zero whatever is sent, and made only where that is sure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fhe_fx.backends.reference.batch import run_batch
from fhe_fx.ir import Program
from fhe_fx.ir import dialect as d
from fhe_fx.ir.integer import Integer
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.passes import Pipeline, default_pipeline
from fhe_fx.passes.masks import stays_inside
from fhe_fx.quant.lookup_noise import LookupNoise
from tests.programs import program_from, seeded

W = seeded((12, 12), n=1, seed=2)[0]
P_ERROR = 0.65


def _weighted(x: Tensor) -> Tensor:
    return torch.tanh(x @ W / 4)


def _lowered(function: Callable[[Tensor], Tensor], readings: int) -> Program:
    program = program_from(function, [(x,) for x in seeded((1, 16, 12), n=32)], n_bits=4)
    passes = tuple(default_pipeline())
    place = [p.name for p in passes].index("allot-bits") + 1
    Pipeline(passes[:place]).run(program)
    for node in program.maps():
        node.meta.update(lookup_bits=8, readings=readings)
    program.options = dataclasses.replace(program.options, p_error=P_ERROR)
    Pipeline(passes[place:]).run(program)
    return program


@pytest.mark.parametrize("noise", [None, LookupNoise.of(P_ERROR)], ids=["clear", "noise"])
def test_zeros_are_zero_at_both_ends_of_what_may_be_sent(noise: LookupNoise | None) -> None:
    program = _lowered(_weighted, 3)
    (place,) = program.placeholders
    kind = place.meta["type"]
    ends = torch.tensor([kind.low, 0, kind.high]).view(3, 1, 1, 1)
    sent = ends.expand(3, *d.shape_of(place)).repeat(500, 1, 1, 1)
    zeros: dict[str, Tensor] = {}
    run_batch(
        program,
        [sent],
        noise=noise,
        record=lambda n, x: zeros.__setitem__(n.name, x) if d.is_call(n, d.EXPAND) else None,
    )
    made = [n.name for n in program.calls(d.EXPAND) if "is_zero" in n.meta]
    assert made
    assert all(not bool(zeros[name].any()) for name in made)


def test_readings_of_the_integers_are_one_value() -> None:
    program = _lowered(_weighted, 3)
    sent = torch.randint(-1000, 1000, (20, 1, 16, 12), generator=torch.Generator().manual_seed(4))
    found: dict[str, Tensor] = {}
    run_batch(program, [sent], record=lambda n, x: found.__setitem__(n.name, x))
    first, *others = (n.name for n in program.calls(LOOKUP) if n.meta["function"] != "zero")
    assert len(others) == 2
    assert all(torch.equal(found[name], found[first]) for name in others)
    assert found[first].unique().numel() > 50


def test_what_fills_its_encoding_makes_no_zero() -> None:
    program = _lowered(torch.tanh, 3)  # the input itself is looked up
    assert len(program.calls(LOOKUP)) == 1
    assert [n.reason for n in program.notes] == [
        "read once: no input stays so far from the ends of its encoding"
    ]


@pytest.mark.parametrize(
    ("width", "bits", "inside"), [(20, 8, True), (14, 8, True), (12, 8, False), (20, 4, False)]
)
def test_what_is_read_stays_eight_deviations_inside(width: int, bits: int, inside: bool) -> None:
    (place,) = _lowered(_weighted, 1).placeholders  # of twelve bits
    kind = place.meta["type"]
    assert kind.bits == 12
    read = Integer(place, kind.scale, kind.offset)
    assert stays_inside(read, width, bits, LookupNoise.of(P_ERROR).deviation) is inside

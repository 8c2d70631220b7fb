"""Ranges of classes: rows that are not read count, channels that are not read do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from fhe_fx.ir import Builder, Program
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.quant.classes import find_classes
from fhe_fx.quant.ranges import class_ends
from tests.conftest import Build, float_program
from tests.programs import seeded

EXP = torch.ops.aten.exp.default
ROWS, CHANNELS = 4, 3
WEIGHT = torch.randn((CHANNELS, 2), generator=torch.Generator().manual_seed(1))
X = torch.stack(seeded((ROWS, CHANNELS))) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
FIRST = torch.tensor([0])  # the row of the least values


def ends_of_result(build: Build) -> tuple[Program, Tensor, Tensor]:
    """Return a calibrated program, and least and greatest value of each class of its result."""
    program = float_program(build, [X[0]])
    program.samples = [(x,) for x in X]
    Calibrate().run(program)
    classes = find_classes(program)
    low, high = class_ends(program, program.results[0], classes.of.__getitem__, classes.n_classes)
    own = classes.of[program.results[0]]
    absent = torch.ones(classes.n_classes, dtype=torch.bool)
    absent[own.reshape(-1)] = False
    assert absent.any()
    assert bool((low[absent] == torch.inf).all())
    assert bool((high[absent] == -torch.inf).all())
    return program, low[own], high[own]


def check(build: Build, values: Tensor) -> None:
    """Compare with `values`, `[n_samples, n_rows, n_channels]`, whose rows are samples all."""
    _, low, high = ends_of_result(build)
    expected = values.double().amin((0, 1)), values.double().amax((0, 1))
    for found, end in zip((low, high), expected, strict=True):
        torch.testing.assert_close(found, end.expand(found.shape), rtol=1e-6, atol=1e-6)


def first_row(b: Builder, x: fx.Node) -> fx.Node:
    return b.index_select(x, 0, FIRST)


def test_rows_that_are_dropped_are_samples_too() -> None:
    check(lambda b, x: first_row(b, b.apply(x, EXP)), X.exp())


def test_moves_are_looked_through() -> None:
    check(
        lambda b, x: b.expand(b.view(first_row(b, b.apply(x, EXP)), (1, 1, CHANNELS)), (2, 5, 3)),
        X.exp(),
    )


def test_a_product_is_evaluated_on_rows_that_it_does_not_read() -> None:
    check(lambda b, x: b.linear(first_row(b, x), WEIGHT), X @ WEIGHT)


@pytest.mark.parametrize("offset", [torch.tensor(0.5), torch.tensor([0.5, -7.0])])
def test_with_what_is_added_to_it(offset: Tensor) -> None:
    check(lambda b, x: b.shift(b.linear(first_row(b, x), WEIGHT), offset), X @ WEIGHT + offset)


def test_an_offset_of_each_row_belongs_to_that_row_alone() -> None:
    offset = torch.tensor([[10.0], [0.0]])
    two = torch.tensor([0, 1])
    check(
        lambda b, x: b.shift(b.linear(b.index_select(x, 0, two), WEIGHT), offset),
        X[:, :2] @ WEIGHT + offset,
    )


def test_weights_meet_the_channels_that_they_were_made_for() -> None:
    reverse = torch.tensor([2, 1, 0])
    check(
        lambda b, x: b.linear(b.index_select(first_row(b, x), 1, reverse), WEIGHT),
        X[:, :1, reverse] @ WEIGHT,  # only what was observed
    )


def test_weights_of_each_row_meet_that_row_alone() -> None:
    weights = torch.stack([WEIGHT, -3 * WEIGHT])
    two = torch.tensor([0, 1])
    program, low, high = ends_of_result(
        lambda b, x: b.linear(b.view(b.index_select(x, 0, two), (2, 1, CHANNELS)), weights)
    )
    values = program.observed[program.results[0].name].double()
    torch.testing.assert_close(low, values.amin(0))
    torch.testing.assert_close(high, values.amax(0))


def test_channels_that_are_dropped_are_absent() -> None:
    # `ends_of_result` holds that the other two channels of the map are inf and -inf.
    middle = torch.tensor([1])
    check(lambda b, x: b.index_select(b.apply(x, EXP), 1, middle), X[..., middle].exp())

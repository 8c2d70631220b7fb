"""`choose-ranges`: room where a wrapped value would hurt, none where it does not."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own habit
from torch import Tensor

from fhe_fx.ir import dialect as d
from fhe_fx.passes import Pipeline, default_pipeline
from tests.programs import (
    lower_with_prediction,
    program_from,
    relative_error,
    run_integers,
    seeded,
)


def _room(function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Return the room below and above the observed range of the only look-up, in parts of it."""
    samples = [(x,) for x in seeded((1, 64, 4), seed=3)]
    program = program_from(function, samples, n_bits=4, p_error=0.1)
    passes = tuple(default_pipeline())[:-2]
    Pipeline(passes[:-1]).run(program)
    before = str(program)
    assert Pipeline(passes[-1:]).run(program)[0].has_changed is False
    assert str(program) == before
    (node,) = program.maps()
    source = d.input_node(node)
    values = program.observed[source.name].double()
    low, high = (end.reshape(-1)[0] for end in source.meta["range"])
    span = values.max() - values.min()
    return float((values.min() - low) / span), float((high - values.max()) / span)


def test_an_input_is_clipped_where_the_function_is_flat() -> None:
    below, above = _room(F.relu)
    assert below < 0 <= above
    below, above = _room(lambda x: F.relu(-x))
    assert above < 0 <= below


def test_a_steep_end_gets_room_at_the_other() -> None:
    # Above its range, 1/x would read what the table holds of its steepest end; tanh would read its
    # flat one. Both of sums: the client clips inputs, and so they never wrap.
    _, above_an_inverse = _room(lambda x: torch.reciprocal(x.sum(-1) + 8))
    assert above_an_inverse > 0
    below, above = _room(lambda x: torch.tanh(x.sum(-1)))
    assert below < 0
    assert above < 0


def test_a_class_has_one_range() -> None:
    samples = [(x,) for x in seeded((1, 3, 4))]
    program = program_from(lambda x: torch.tanh(x @ torch.ones(4, 2)), samples, n_bits=4)
    Pipeline(tuple(default_pipeline())[:-2]).run(program)
    low, high = d.input_node(program.maps()[0]).meta["range"]
    assert bool((low == low[:, :1]).all())
    assert bool((high > low).all())


def test_an_input_that_is_moved_before_its_look_up_is_not_cut_where_it_would_wrap() -> None:
    # The client clips what a look-up reads straight away; this one drops a column first.
    columns = torch.tensor([2, 1])
    samples = [(x,) for x in seeded((1, 4, 3), seed=4914)]
    program = program_from(lambda x: F.relu(x.index_select(2, columns)), samples)
    (expected,), (predicted,) = lower_with_prediction(program)
    (found,) = run_integers(program, program.samples)
    assert relative_error(expected, found) < 2 * predicted


def test_a_value_does_not_wrap_where_only_its_derivative_says_that_it_may() -> None:
    # Where z is least, no small error of max(x, y) changes the result; a large one does.
    samples = list(zip(*(seeded((16, 8), n=32, seed=seed) for seed in (0, 1, 2)), strict=True))
    program = program_from(lambda x, y, z: torch.minimum(torch.maximum(x, y), z), samples)
    (expected,), (predicted,) = lower_with_prediction(program)
    (found,) = run_integers(program, program.samples)
    worst = float((expected - found).abs().max() / expected.std())
    # Of 4,096 normal errors, one is beyond 6 deviations with probability 1e-5.
    assert worst < 6 * predicted

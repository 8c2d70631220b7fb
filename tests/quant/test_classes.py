"""Scale classes: which elements share one, which do not, and statistics over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from fhe_fx.ir import Program
from fhe_fx.quant.classes import (
    Classes,
    absorbed_scales,
    encodings,
    find_classes,
    is_exact_scale,
)
from tests.conftest import Build, float_program

EXP = torch.ops.aten.exp.default
QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def program_of(build: Build, *shapes: tuple[int, ...]) -> Program:
    return float_program(build, [torch.zeros(shape) for shape in shapes])


def classes_of(build: Build, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return the classes of every encrypted node, in the order of the program."""
    return list(find_classes(program_of(build, *shapes)).of.values())


def is_same_partition(a: Tensor, b: Tensor) -> bool:
    """Say whether two numberings put the same elements together."""
    pairs = set(zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True))
    return len(pairs) == len({first for first, _ in pairs}) == len({second for _, second in pairs})


def positions(shape: tuple[int, ...], *, without: set[int]) -> Tensor:
    """Number the elements of a tensor, those alike that differ in the dimensions `without`."""
    kept = [1 if dim in without else size for dim, size in enumerate(shape)]
    return torch.arange(int(np.prod(kept))).view(kept).expand(shape)


def apart(x: Tensor, y: Tensor) -> bool:
    return not np.intersect1d(x.numpy(), y.numpy()).size


# Which elements share a class -------------------------------------------------------------------


def test_the_rows_of_an_input_share_the_class_of_their_channel() -> None:
    (x,) = classes_of(lambda b, x: x, (2, 2, 3))
    assert is_same_partition(x, positions((2, 2, 3), without={0, 1}))
    assert classes_of(lambda b, x: x, ())[0].shape == ()


@pytest.mark.parametrize("operator", ["add", "sub"])
def test_a_sum_of_two_joins_element_by_element(operator: str) -> None:
    x, y, z = classes_of(lambda b, x, y: getattr(b, operator)(x, y), (2, 3), (2, 3))
    assert torch.equal(x, y)
    assert torch.equal(x, z)
    assert x.unique().numel() == 3


def test_ties_reach_through_what_was_joined_before() -> None:
    # x + y and y + z share y, so x and z share a scale that no operator ties directly.
    *_, z, _, _, both = classes_of(
        lambda b, x, y, z: b.cat([b.add(x, y), b.add(y, z)], 0), (3,), (3,), (3,)
    )
    assert torch.equal(both, torch.cat([z, z]))


@QUICK
@given(st.tuples(*[st.integers(1, 3)] * 3), st.sets(st.integers(0, 2), min_size=1), st.booleans())
def test_a_sum_joins_exactly_what_it_adds(
    shape: tuple[int, int, int], dims: set[int], keepdim: bool
) -> None:
    n = int(np.prod(shape))
    found = classes_of(lambda b, x: b.sum(b.view(x, shape), dims, keepdim), (n,))
    assert is_same_partition(found[0], positions(shape, without=dims))
    assert torch.equal(found[-1].unique(), found[0].unique())


@QUICK
@given(
    st.lists(st.integers(1, 2), max_size=2),
    st.lists(st.integers(1, 2), max_size=3),
    st.integers(1, 3),
)
@example([2], [2, 1], 1)  # weights of more dimensions than the rows, aligned at the right
def test_a_product_with_clear_weights_joins_the_rows_that_share_them(
    batch: list[int], own: list[int], n_rows: int
) -> None:
    shape = (*batch, n_rows, 3)
    weight = torch.ones(*own, 3, 2)
    *_, x, y = classes_of(lambda b, x: b.linear(b.view(x, shape), weight), (int(np.prod(shape)),))
    aligned = ([1] * len(batch) + own)[-len(batch) :] if batch else []
    shared = {dim for dim, size in enumerate(aligned) if size == 1} | {len(batch)}
    assert is_same_partition(x.view(shape), positions(shape, without=shared))
    # The results: a class for each column of each matrix, and none of the input's.
    columns = torch.arange(weight[..., 0, :].numel()).view(*own, 1, 2).expand(y.shape)
    assert is_same_partition(y, columns)
    assert apart(x, y)


def test_a_product_of_two_has_a_class_for_each_pair_of_classes() -> None:
    x, y, _, z = classes_of(lambda b, x, y: b.mul(x, y), (2, 3), (2, 1))
    assert is_same_partition(z, x)  # the second operand has one class
    assert apart(z, x)
    assert apart(z, y)
    *_, z = classes_of(lambda b, x, y: b.mul(b.view(x, (2, 1)), y), (2,), (2, 3))
    assert z.unique().numel() == 6


def test_a_map_has_classes_of_its_own_for_the_same_elements() -> None:
    x, y = classes_of(lambda b, x: b.apply(x, EXP), (2, 3))
    assert is_same_partition(x, y)
    assert apart(x, y)


def test_a_matrix_product_of_two_has_one_class() -> None:
    *_, z = classes_of(lambda b, x, y: b.matmul(x, y), (2, 3), (3, 4))
    assert z.unique().numel() == 1


def test_moved_elements_keep_their_classes() -> None:
    index = torch.tensor([2, 0, 2])
    x, y, joined, chosen = classes_of(
        lambda b, x, y: b.index_select(b.cat([x, y], 0), 1, index), (1, 3), (2, 3)
    )
    assert apart(x, y)
    assert torch.equal(joined, torch.cat([x, y]))
    assert torch.equal(chosen, joined[:, index])


def test_a_shift_keeps_the_scale_and_a_factor_changes_it() -> None:
    def build(factor: float) -> Build:
        return lambda b, x: b.apply(b.shift(b.scale(b.apply(x, EXP), factor), 2.5), EXP)

    _, x, scaled, shifted, _ = classes_of(build(0.5), (2, 3))
    assert apart(scaled, x)
    assert torch.equal(shifted, scaled)
    _, x, scaled, _, _ = classes_of(build(-3.0), (2, 3))  # integers need no new scale
    assert torch.equal(scaled, x)


# Scalings that cost nothing ---------------------------------------------------------------------


def test_a_factor_behind_an_input_or_before_a_result_is_absorbed() -> None:
    program = program_of(lambda b, x: b.apply(b.scale(x, 0.3), EXP), (3,))
    (scale,) = program.calls(torch.ops.fhe_fx.scale.default)
    assert absorbed_scales(program) == {scale: program.placeholders[0]}
    classes = find_classes(program).of
    assert torch.equal(classes[scale], classes[program.placeholders[0]])
    program = program_of(lambda b, x: b.scale(b.apply(x, EXP), 0.3), (3,))
    (scale,) = program.calls(torch.ops.fhe_fx.scale.default)
    assert absorbed_scales(program) == {scale: scale}


@pytest.mark.parametrize(
    "build",
    [
        lambda b, x: b.apply(b.scale(x, torch.tensor([1.0, 0, 2])), EXP),  # has a zero
        lambda b, x: b.apply(b.add(b.scale(x, 0.3), x), EXP),  # the input has another reader
        lambda b, x: b.apply(b.scale(b.apply(x, EXP), 0.3), EXP),  # in the middle
        lambda b, x: b.add(y := b.apply(x, EXP), b.scale(y, 0.3)),  # not the result itself
    ],
)
def test_other_factors_are_not_absorbed(build: Build) -> None:
    assert absorbed_scales(program_of(build, (3,))) == {}


@pytest.mark.parametrize(
    ("factor", "is_exact"),
    [
        ([2.0, 2.0], True),
        ([1.0, -3.0], True),
        ([0.0, 0.0], True),
        ([1.0, 1.0], False),
        ([2.0, 0.5], False),
    ],
)
def test_integers_other_than_one_are_exact_factors(factor: list[float], is_exact: bool) -> None:
    program = program_of(lambda b, x: b.scale(x, torch.tensor(factor)), (2,))
    assert is_exact_scale(program.results[0]) is is_exact
    assert not is_exact_scale(program.placeholders[0])


def test_only_look_ups_part_encodings() -> None:
    program = program_of(
        lambda b, x, y: b.add(b.apply(b.scale(x, 0.3), EXP), b.sum(y, [0], True)), (1, 3), (2, 3)
    )
    by_name = {node.name: number for node, number in encodings(program).items()}
    x, y, scaled, mapped, total, added = (by_name[n.name] for n in program.encrypted())
    assert x == scaled
    assert mapped == y == total == added
    assert x != y


def test_one_source_ties_the_encodings_of_all_that_read_it() -> None:
    program = program_of(lambda b, x, y: b.add(b.apply(b.add(x, y), EXP), b.sub(x, y)), (3,), (3,))
    assert len(set(encodings(program).values())) == 1  # x + y and x - y, which only x and y tie


# Statistics of a class --------------------------------------------------------------------------


@QUICK
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_statistics_equal_numpy(seed: int, n_samples: int, width: int, n_rows: int) -> None:
    random = np.random.default_rng(seed)
    index = random.integers(0, 6, (n_rows, width))
    values = random.normal(3, 10, (n_samples, n_rows, width)).astype(np.float32)
    node = fx.Graph().placeholder("x")
    classes = Classes({node: torch.from_numpy(index)}, 6)
    low, high = classes.extremes(node, torch.from_numpy(values))
    mean, deviation = classes.moments(node, torch.from_numpy(values))
    for number in range(6):
        members = values[:, index == number].astype(np.float64)
        if members.size:
            assert low[number] == members.min()
            assert high[number] == members.max()
            np.testing.assert_allclose(mean[number], members.mean(), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(deviation[number], members.std(), rtol=1e-9, atol=1e-12)
        else:
            assert (float(low[number]), float(high[number])) == (np.inf, -np.inf)
            assert mean[number].isnan()
            assert deviation[number].isnan()

"""Tables: means over a slot, anti-periodic ends, and functions that have no value somewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fhe_fx.ir.build import elementwise
from fhe_fx.ir.ops import TABULATED
from fhe_fx.quant.tables import Tables, build_tables, distinct_rows

BITS = 4
SLOT = 0.25


def real(tables: Tables, scale: float) -> Tensor:
    """Return what the first element's table answers, in real values."""
    entries = tables.entries[tables.which.reshape(-1)[0]]
    return entries.double() * scale + tables.offset.reshape(-1)[0]


def build(function: object, centre: float = 0.0, **more: object) -> Tables:
    one = torch.ones(1, dtype=torch.float64)
    return build_tables(function, centre * one, SLOT * one, 1e-4 * one, BITS, **more)  # type: ignore[arg-type]


def test_an_entry_is_the_mean_over_its_slot() -> None:
    found = real(build(lambda x: x**2), 1e-4)
    middle = torch.arange(-8, 8).double() * SLOT
    # Mean of x^2 over a slot: the middle squared, and the variance of eight even points.
    expected = middle**2 + SLOT**2 * (1 - 1 / 64) / 12
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_table_continues_anti_periodically() -> None:
    for function in (torch.exp, torch.square, torch.nn.functional.gelu):
        entries = build(function).entries[0]
        assert abs(int(entries[0] + entries[-1])) <= 1


def test_below_its_domain_a_function_answers_as_at_its_end() -> None:
    found = real(build(torch.log), 1e-4)
    assert bool(found.isfinite().all())
    assert float((found[:8] - found[8]).abs().max()) < 1e-3  # log has no value below zero
    assert float(found[9]) > float(found[8])


def test_above_its_domain_too() -> None:
    found = real(build(lambda x: torch.log(1 - x)), 1e-4)
    # Slot 4 is centred on 1: half of it still has values.
    assert float((found[13:] - found[12]).abs().max()) < 1e-3
    assert float(found[12]) < float(found[11])


def test_a_pole_is_cut_at_the_bounds() -> None:
    one = torch.ones(1, dtype=torch.float64)
    found = real(build(torch.reciprocal, bounds=(-2 * one, 2 * one)), 1e-4)
    assert float(found.abs().max()) <= 2 + 1e-3
    assert abs(float(found[15]) - 1 / (7 * SLOT)) < 2e-2


def test_a_function_without_any_value_is_zero() -> None:
    assert float(real(build(torch.log, centre=-100.0), 1e-4).abs().max()) == 0


def test_equal_tables_are_kept_once() -> None:
    centre = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    tables = build_tables(torch.square, centre, SLOT * one, 1e-4 * one, BITS)
    assert tables.entries.shape == (2, 16)
    assert tables.which[0] == tables.which[2] != tables.which[1]


def test_a_tabulated_value_is_the_mean_that_its_own_table_holds() -> None:
    exp, square = torch.ops.aten.exp.default, torch.ops.aten.square.default
    inner = real(build(elementwise((exp, (), {}))), 1e-4)
    outer = real(build(elementwise((exp, (), {}), (TABULATED, (), {}), (square, (), {}))), 1e-4)
    torch.testing.assert_close(outer, inner.square(), rtol=1e-3, atol=1e-3)
    without = real(build(elementwise((exp, (), {}), (square, (), {}))), 1e-4)
    # The variance of exp over a slot, in parts of its square: slot^2 / 12 to first order.
    more = (without / outer - 1)[8:]
    assert float((more / (SLOT**2 / 12) - 1).abs().max()) < 0.05


def test_distinct_rows_are_those_of_a_sort_of_whole_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(-(2**40), 2**40, (7, 16), generator=generator)
    many = few[torch.randint(7, (500,), generator=generator)]
    for rows in (many, few, few[:1], torch.zeros(5, 4, dtype=torch.int64), many[:, :1]):
        expected = torch.unique(rows, dim=0, return_inverse=True)
        assert all(map(torch.equal, distinct_rows(rows), expected))


def test_rows_of_one_sum_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([[1, 2], [2, 1], [1, 2]])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.ones(2, dtype=torch.int64))
    distinct, which = distinct_rows(rows)
    assert distinct.tolist() == [[1, 2], [2, 1]]
    assert which.tolist() == [0, 1, 0]

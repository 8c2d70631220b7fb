"""Constants that are handed to MLIR as bytes are the attributes that their text stands for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fhe_fx.backends.concrete.constants import constants_as_bytes

fhe: Any = importlib.import_module("concrete.fhe")
concrete_context: Any = importlib.import_module("concrete.fhe.mlir.context")

WIDTHS = (2, 5, 7, 8, 9, 13, 16, 17, 24, 25, 31, 32, 33, 47, 63, 64)


@pytest.fixture
def context() -> Iterator[Any]:
    """A converter's context, as far as attributes need one."""
    made: Any = object.__new__(concrete_context.Context)
    with concrete_context.MlirContext(), concrete_context.MlirLocation.unknown():
        yield made


def _both(context: Any, element: Any, value: Any) -> tuple[Any, Any]:
    """Return the attribute by text and the one by bytes."""
    shape = list(np.shape(value))
    kind = concrete_context.ConversionType(concrete_context.RankedTensorType.get(shape, element))
    by_text = context.attribute(kind, value)
    with constants_as_bytes():
        return by_text, context.attribute(kind, value)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3, 4)])
def test_bytes_give_the_attribute_of_the_text(
    context: Any, width: int, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(width)
    element = concrete_context.IntegerType.get_signless(width)
    ends = [(-(1 << (width - 1)), (1 << (width - 1)) - 1), (0, (1 << width) - 1), (-1, -1), (1, 1)]
    for low, high in ends:
        dtype = np.uint64 if low == 0 else np.int64
        values = rng.integers(low, high, size=shape, endpoint=True, dtype=dtype)
        by_text, by_bytes = _both(context, element, values)
        assert by_text == by_bytes, (low, high)
        assert str(by_text) == str(by_bytes)


def test_lists_keep_their_64_bits(context: Any) -> None:
    element = concrete_context.IntegerType.get_signless(64)
    for values in (
        [[2**64 - 1, 3], [2**63, 0]],
        [[-(2**63), 3], [2**62 + 1, 0]],
        [[2**63, 1], [-1, 2]],
    ):
        by_text, by_bytes = _both(context, element, values)
        assert by_text == by_bytes


def test_lists_and_indices_are_taken_too(context: Any) -> None:
    by_text, by_bytes = _both(context, concrete_context.IndexType.get(), [[0, 5], [7, 1]])
    assert by_text == by_bytes


def test_rows_that_are_not_contiguous_keep_their_order(context: Any) -> None:
    element = concrete_context.IntegerType.get_signless(9)
    by_text, by_bytes = _both(context, element, np.arange(12).reshape(3, 4).T)
    assert by_text == by_bytes


def test_bits_are_left_to_the_text(context: Any) -> None:
    element = concrete_context.IntegerType.get_signless(1)
    by_text, by_bytes = _both(context, element, np.array([1, 0, 1]))
    assert by_text == by_bytes


def test_what_does_not_fit_its_width_is_refused_as_before(context: Any) -> None:
    kind = concrete_context.ConversionType(
        concrete_context.RankedTensorType.get([1], concrete_context.IntegerType.get_signless(4))
    )
    with constants_as_bytes(), pytest.raises(Exception, match="Unable to parse attribute"):
        context.attribute(kind, np.array([16]))


def test_circuits_are_the_same() -> None:
    def compiled() -> str:
        @fhe.compiler({"x": "encrypted"})  # type: ignore[untyped-decorator]
        def function(x: Any) -> Any:
            tables = [fhe.LookupTable([(k * i) % 16 for i in range(16)]) for k in (3, 5)]
            which = fhe.LookupTable(np.array([tables[0], tables[1], tables[0]]))
            return which[x @ np.array([[1, 0, 1], [2, 1, 0]])]

        inputs = [np.array([0, 0]), np.array([3, 3])]
        return str(function.compile(inputs, verbose=False).mlir)

    by_text = compiled()
    with constants_as_bytes():
        assert compiled() == by_text

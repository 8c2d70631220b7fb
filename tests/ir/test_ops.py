"""The operators: their meaning, and that their shapes agree with it."""

from __future__ import annotations

import pytest
import torch

from fhe_fx.ir import ops
from fhe_fx.ir.types import ValueType


@pytest.mark.parametrize(("bits", "lsbs"), [(3, 0), (3, 2), (4, 3)])
def test_a_look_up_continues_anti_periodically(bits: int, lsbs: int) -> None:
    n = 1 << bits
    table = torch.arange(10, 10 + n).unsqueeze(0)
    x = torch.arange(-(2 * n << lsbs), 2 * n << lsbs)
    found = ops.LOOKUP(x, table, torch.zeros(1, dtype=torch.int64), bits, lsbs)
    for value, y in zip(x.tolist(), found.tolist(), strict=True):
        rounded = (value + (1 << lsbs >> 1)) >> lsbs
        turns, index = divmod(rounded + n // 2, n)
        assert y == (-1) ** turns * (10 + index)


def test_elements_read_their_own_table() -> None:
    tables = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    x = torch.tensor([[-2, 1], [0, -1]])
    found = ops.LOOKUP(x, tables, torch.tensor([0, 1]), 2, 0)
    assert found.tolist() == [[1, 8], [3, 6]]


def test_linear_is_exact_beyond_doubles() -> None:
    x, w = torch.tensor([[(1 << 40) + 1, 3]]), torch.tensor([[1 << 20], [1]])
    assert ops.LINEAR(x, w).item() == ((1 << 40) + 1) * (1 << 20) + 3


def test_softmax_of_a_row_without_live_entries_is_zero() -> None:
    live = torch.tensor([[True, True], [False, False]])
    found = ops.MASKED_SOFTMAX(torch.zeros(2, 2), live, False)
    assert found.tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_pairs_taken_and_put_back() -> None:
    x = torch.arange(6.0).view(2, 3)
    rows, columns = torch.tensor([0, 1]), torch.tensor([2, 0])
    taken = ops.TAKE_PAIRS(x, rows, columns)
    assert taken.tolist() == [2.0, 3.0]
    assert ops.PUT_PAIRS(taken, rows, columns, 2, 3).tolist() == [[0, 0, 2], [3, 0, 0]]


def _seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


X, ROWS = _seeded(2, 3, 4), torch.tensor([0, 1])
N = torch.arange(6).view(2, 3)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (ops.SCALE, (X, torch.ones(4))),
        (ops.SHIFT, (X, torch.ones(3, 1))),
        (ops.LINEAR, (X, torch.ones(4, 5))),
        (ops.LINEAR, (X, torch.ones(2, 4, 5))),
        (ops.TAKE_PAIRS, (X, ROWS, ROWS)),
        (ops.PUT_PAIRS, (X[..., :2], ROWS, ROWS, 3, 4)),
        (ops.MASKED_SOFTMAX, (X, torch.ones(4, dtype=torch.bool), True)),
        (ops.LOOKUP, (N, torch.ones(1, 4, dtype=torch.int64), torch.zeros_like(N), 2, 1)),
    ],
    ids=str,
)
def test_shapes_are_known_without_values(
    op: torch._ops.OpOverload, args: tuple[object, ...]
) -> None:
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (ops.SCALE, (torch.linspace(1, 2, 4),)),
        (ops.SHIFT, (torch.ones(3, 1),)),
        (ops.TABULATED, ()),
        (ops.LINEAR, (_seeded(4, 5).double(),)),
        (ops.LINEAR, (_seeded(2, 4, 5).double(),)),
        (ops.LINEAR, (_seeded(3, 2, 4, 5).double(),)),
        (ops.TAKE_PAIRS, (torch.tensor([0, 1, 1]), torch.tensor([2, 0, 0]))),
        (ops.PUT_PAIRS, (torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 2]), 2, 3)),
        (ops.MASKED_SOFTMAX, (torch.tensor([True, False, True, True]), False)),
        (ops.MASKED_SOFTMAX, (torch.tensor([True, False, True, True]), True)),
        (ops.MASKED_SOFTMAX, (torch.zeros(4, dtype=torch.bool), False)),
    ],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(
    op: torch._ops.OpOverload, args: tuple[object, ...]
) -> None:
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: op(v, *args), (x,))


@pytest.mark.parametrize(
    ("rows", "weights"),
    [
        ((5, 4, 1), (4,)),
        ((5, 1, 2), (4,)),
        ((3, 5, 4, 2), (4,)),
        ((5, 3, 1, 2), (3, 4)),
        ((2,), (4,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_stacks_of_matrices_multiply_stacks_of_samples(
    rows: tuple[int, ...], weights: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight = ((7 * _seeded(*s)).round().to(dtype) for s in ((*rows, 6), (*weights, 6, 3)))
    assert torch.equal(ops.LINEAR(x, weight), torch.matmul(x, weight))


@pytest.mark.parametrize(
    ("low", "high", "bits", "text"),
    [(-128, 127, 8, "int8"), (0, 255, 8, "uint8"), (-1, 0, 1, "int1"), (-9, 3, 5, "int5"),
     (0, 0, 1, "uint1"), (-1, 8, 5, "int5")],
)  # fmt: skip
def test_bits_of_a_type(low: int, high: int, bits: int, text: str) -> None:
    one = torch.ones((), dtype=torch.float64)
    kind = ValueType(one, one, low, high)
    assert (kind.bits, str(kind)) == (bits, text)
    assert ValueType.signed(5, one, one).low == -16


@pytest.mark.parametrize(("bits", "lsbs"), [(3, 0), (3, 2), (4, 3)])
def test_a_result_is_read_modulo_twice_the_number_of_its_slots(bits: int, lsbs: int) -> None:
    x = torch.arange(-(4 << bits + lsbs), 4 << bits + lsbs)
    found = ops.ROUND(x, bits, lsbs)
    for value, y in zip(x.tolist(), found.tolist(), strict=True):
        rounded = (value + (1 << lsbs >> 1)) >> lsbs
        assert -(1 << bits) <= y < 1 << bits
        assert (rounded - y) % (2 << bits) == 0

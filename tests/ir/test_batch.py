"""A batch gives what its samples give one by one, for every operator that moves dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fhe_fx.ir import Builder
from fhe_fx.ir.batch import BatchInterpreter
from tests.conftest import Build, float_program
from tests.programs import seeded

aten = torch.ops.aten
ROWS, COLUMNS = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 3])
MASK = torch.ones(3, 4, dtype=torch.bool).tril()


def _pairs(b: Builder, x: fx.Node) -> fx.Node:
    return b.put_pairs(b.take_pairs(x, ROWS, COLUMNS), ROWS, COLUMNS, 2, 5)


BUILDS: dict[str, Build] = {
    "view": lambda b, x: b.view(x, (3, -1)),
    "expand": lambda b, x: b.expand(b.sum(x, [1], keepdim=True), (5, 2, 3, 4)),
    "permute": lambda b, x: b.permute(x, [2, 0, 1]),
    "sum": lambda b, x: b.sum(x, [0, -1]),
    "cat": lambda b, x: b.cat([x, x], -1),
    "index_select": lambda b, x: b.index_select(x, -2, ROWS),
    "add_of_fewer_dimensions": lambda b, x: b.add(x, b.index_select(x, 0, ROWS[:1])),
    "scale_by_channel": lambda b, x: b.scale(x, torch.arange(4.0)),
    "shift_by_row": lambda b, x: b.shift(x, torch.arange(3.0).view(3, 1)),
    "linear": lambda b, x: b.linear(x, torch.ones(4, 5)),
    "linear_of_a_batch": lambda b, x: b.linear(x, torch.randn(5, 2, 4, 6)),
    "matmul": lambda b, x: b.matmul(x, b.transpose(x, 1, 2)),
    "mul": lambda b, x: b.mul(x, x),
    "softmax": lambda b, x: b.masked_softmax(x, MASK),
    "pairs": _pairs,
    "map": lambda b, x: b.apply(x, aten.mul.Tensor, torch.arange(12.0).view(3, 4)),
}


@pytest.mark.parametrize("name", BUILDS)
def test_a_batch_is_its_samples(name: str) -> None:
    samples = seeded((2, 3, 4), n=5)
    program = float_program(BUILDS[name], [samples[0]])
    (found,) = BatchInterpreter(program.module).run(torch.stack(samples))
    expected = torch.stack([program(x)[0] for x in samples])
    torch.testing.assert_close(found, expected)

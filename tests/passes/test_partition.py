"""`partition`: three parts that compose to what the graph was (more in tests/capture)."""

from __future__ import annotations

import torch
from torch import nn

from fhe_fx.capture import capture
from fhe_fx.passes import Annotate, Partition, Pipeline
from fhe_fx.passes.partition import ENCRYPTED, PREFIX, SUFFIX

MODEL = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).eval()
X = torch.linspace(-1, 1, 3).view(1, 3)


def test_prefix_region_and_suffix_compose_to_the_model() -> None:
    program = capture(MODEL, (X,), {}, ["1"])
    Pipeline((Annotate("1"), Partition())).run(program)
    assert [name for name, _ in program.module.named_children()] == [PREFIX, ENCRYPTED, SUFFIX]
    torch.testing.assert_close(program(X)[0], MODEL(X), rtol=0, atol=0)


def test_parts_that_do_not_exist_are_not_made() -> None:
    program = capture(MODEL, (X,), {}, ["0"])
    Pipeline((Annotate("0"), Partition())).run(program)
    assert [name for name, _ in program.module.named_children()] == [ENCRYPTED, SUFFIX]
    torch.testing.assert_close(program(X)[0], MODEL(X), rtol=0, atol=0)

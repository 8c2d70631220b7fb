"""`limit-factors`: a factor that is rarely large is limited where that lowers the error."""

from __future__ import annotations

from textwrap import dedent

import torch
from torch import fx

from fhe_fx.ir import Builder
from fhe_fx.ir import dialect as d
from fhe_fx.passes import Pipeline
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.passes.limit_factors import LimitFactors
from tests.conftest import Build, float_program, statements
from tests.programs import seeded

aten = torch.ops.aten
PRODUCT = """
    %0 = input()
    %1 = input()
    %2 = map[exp](%0)
    %3 = mul(%2, %1)
    return %3
"""


def _product(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
    return b.mul(b.apply(x, aten.exp.default), y)


def _run(build: Build, outlier: float) -> tuple[str, torch.Tensor]:
    """Return the program after the pass, and its factor's values; one sample is an outlier."""
    x, y = seeded((1, 8), n=32, seed=1), seeded((1, 8), n=32, seed=2)
    x = [0.1 * v for v in x]
    x[3], y[3] = torch.full((1, 8), outlier), torch.zeros(1, 8)
    program = float_program(build, [x[0], y[0]])
    program.samples = list(zip(x, y, strict=True))
    program.properties |= {"fused", "no-matmul"}
    Pipeline((Calibrate(), LimitFactors(), Calibrate())).run(program)
    (product,) = program.calls(d.MUL)
    return statements(program), program.observed[d.operands(product)[0].name]


def test_a_factor_with_a_rare_large_value_is_limited() -> None:
    text, values = _run(_product, outlier=6.0)
    assert (
        text
        == dedent("""
        %0 = input()
        %1 = input()
        %2 = map[exp](%0)
        %3 = map[clamp](%2)
        %4 = mul(%3, %1)
        return %4
    """).strip()
    )
    rare = values[3]
    ordinary = torch.cat([values[:3], values[4:]])
    assert float(rare.max()) < 20 < float(torch.tensor(6.0).exp())
    assert float(ordinary.max()) <= float(rare.max())  # the limit cuts nothing else


def test_a_factor_of_even_values_is_left_alone() -> None:
    text, _ = _run(_product, outlier=0.2)
    assert text == dedent(PRODUCT).strip()


def test_a_factor_that_others_read_is_left_alone() -> None:
    def build(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        factor = b.apply(x, aten.exp.default)
        return b.add(b.mul(factor, y), factor)

    text, _ = _run(build, outlier=6.0)
    assert "clamp" not in text

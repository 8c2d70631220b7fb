"""`fold-means`: a mean taken off a residual stream that products make."""

from __future__ import annotations

import pytest
import torch

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import LINEAR
from fhe_fx.passes import default_pipeline
from fhe_fx.passes.base import Pipeline
from fhe_fx.passes.fold_means import FoldMeans
from fhe_fx.quant.noise_level import NoiseLevel
from fhe_fx.testing import assert_equivalent, float_program
from tests.conftest import CheckPass
from tests.programs import lower, program_from, relative_error, run_all, run_integers, seeded

EXP, TANH = torch.ops.aten.exp.default, torch.ops.aten.tanh.default
W = torch.arange(16.0).view(4, 4) / 8
WIDE = seeded((64, 64), n=1, seed=3)[0] / 8


def _centred_stream(b: Builder, x: torch.fx.Node) -> torch.fx.Node:
    stream = b.add(b.shift(b.linear(b.apply(x, EXP), W), 1.0), x)
    centred = b.sub(b.scale(stream, 4.0), b.expand(b.sum(stream, [1], keepdim=True), (3, 4)))
    return b.add(b.apply(centred, TANH), stream)


def test_each_product_gives_what_is_left_without_the_mean(check_pass: CheckPass) -> None:
    check_pass(
        FoldMeans(),
        _centred_stream,
        inputs=[torch.linspace(-1, 1, 12).view(3, 4)],
        before="""
            %0 = input()
            %1 = map[exp](%0)
            %2 = linear(%1, float[4, 4])
            %3 = shift(%2, 1)
            %4 = add(%3, %0)
            %5 = scale(%4, 4)
            %6 = sum(%4, [1], True)
            %7 = expand(%6, [3, 4])
            %8 = sub(%5, %7)
            %9 = map[tanh](%8)
            %10 = add(%9, %4)
            return %10
        """,
        after="""
            %0 = input()
            %1 = map[exp](%0)
            %2 = linear(%1, float[4, 4])
            %3 = shift(%2, 1)
            %4 = add(%3, %0)
            %5 = linear(%1, float[4, 4])
            %6 = linear(%0, float[4, 4])
            %7 = add(%5, %6)
            %8 = map[tanh](%7)
            %9 = add(%8, %4)
            return %9
        """,
    )


def _norm_behind_a_skip(x: torch.Tensor) -> torch.Tensor:
    stream = x + torch.tanh(x) @ WIDE
    centred = stream - stream.mean(-1, keepdim=True)
    return torch.tanh(centred) + stream


def test_noise_is_not_multiplied_by_the_number_of_channels() -> None:
    samples, unseen = ([(x,) for x in seeded((3, 64), n=n, seed=n)] for n in (48, 8))
    norms, errors = [], []
    for has_pass in (False, True):
        program = program_from(_norm_behind_a_skip, samples, n_bits=6, p_error=0.05)
        kept = [p for p in default_pipeline() if has_pass or not isinstance(p, FoldMeans)]
        Pipeline(tuple(kept)).run(program)
        norms.append(NoiseLevel.of(program).look_ups)
        (expected,) = run_all(program_from(_norm_behind_a_skip, samples), unseen)
        (found,) = run_integers(program, unseen)
        errors.append(relative_error(expected, found))
    assert norms[0] - norms[1] > 4  # of log2(64) = 6
    assert errors[1] < 1.1 * errors[0]


def test_a_mean_of_answers_alone_is_left() -> None:
    def answers_alone(x: torch.Tensor) -> torch.Tensor:
        y = torch.exp(x)
        return torch.tanh(y - y.mean(-1, keepdim=True))

    program = program_from(answers_alone, [(x,) for x in seeded((2, 8), n=16)])
    lower(program)
    assert all(d.input_node(n).op == "placeholder" for n in program.calls(LINEAR))


@pytest.mark.parametrize("product_first", [True, False])
def test_what_a_product_multiplies_may_be_read_beside_it(product_first: bool) -> None:
    def beside(b: Builder, x: torch.fx.Node) -> torch.fx.Node:
        scaled = b.shift(b.scale(x, 3.0), 1.0)
        product = b.linear(scaled, W)
        stream = b.add(product, scaled) if product_first else b.add(scaled, product)
        total = b.expand(b.sum(stream, [1], keepdim=True), (3, 4))
        return b.apply(b.sub(b.scale(stream, 4.0), total), TANH)

    inputs = [torch.linspace(-1, 1, 12).view(3, 4)]
    given, program = (float_program(beside, inputs) for _ in range(2))
    assert FoldMeans().run(program)
    assert_equivalent(given, program, [tuple(inputs)])

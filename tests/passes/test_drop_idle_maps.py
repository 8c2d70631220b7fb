"""`drop-idle-maps`: look-ups that no result depends on."""

from __future__ import annotations

import math
from textwrap import dedent

import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own habit
from torch import Tensor, fx

from fhe_fx.ir import Builder
from fhe_fx.ir import dialect as d
from fhe_fx.passes import Pass, Pipeline, default_pipeline
from fhe_fx.passes.calibrate import Calibrate
from fhe_fx.passes.drop_idle_maps import DropIdleMaps
from tests.conftest import Build, float_program, statements
from tests.programs import program_from, run_all, seeded

aten = torch.ops.aten


def _run(build: Build) -> tuple[str, list[str]]:
    samples = [(x,) for x in seeded((1, 4))]
    program = float_program(build, samples[0])
    program.samples = list(samples)
    Calibrate().run(program)
    expected = run_all(program, program.samples)
    DropIdleMaps().run(program)
    program.clean()
    torch.testing.assert_close(run_all(program, program.samples), expected)
    return statements(program), [n.reason for n in program.notes]


def test_a_term_that_cancels_is_dropped() -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        row = b.apply(b.sum(x, [-1], keepdim=True), aten.square.default)
        shifted = b.add(b.apply(x, aten.tanh.default), b.expand(row, (1, 4)))
        return b.sub(shifted, b.index_select(shifted, -1, torch.zeros(4, dtype=torch.int64)))

    text, _ = _run(build)
    assert text == dedent("""
        %0 = input()
        %1 = map[tanh](%0)
        %2 = shift(%1, ?)
        %3 = index_select(%2, 1, [0 0 0 0])
        %4 = sub(%2, %3)
        return %4
    """).strip().replace("?", text.split("shift(%1, ")[1].split(")")[0])


def test_what_no_sample_needs_but_others_might_stays() -> None:
    # No sample reaches 8: on all of them the first map is idle. Random inputs reach it.
    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.apply(b.shift(b.apply(x, aten.sinh.default), -8.0), aten.relu.default)

    text, _ = _run(build)
    assert "sinh" in text


def test_what_a_step_reads_stays() -> None:
    # A step is flat wherever it has a derivative; what it reads decides on which side it is.
    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.apply(b.add(x, b.apply(x, aten.sin.default)), aten.sign.default)

    text, _ = _run(build)
    assert "map[sin]" in text


def test_what_a_map_reads_stays_with_a_note() -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        inner = b.apply(b.apply(x, aten.tanh.default), aten.sin.default)
        return b.add(x, b.sub(inner, b.scale(inner, 1.0)))

    text, notes = _run(build)
    assert "map[tanh]" in text
    assert "map[sin]" in text
    assert set(notes) == {"its answers change nothing, but more than sums read them"}


def _look_ups(passes: tuple[Pass, ...]) -> int:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    samples = list(zip(*(seeded((1, 4, 8), seed=i) for i in range(3)), strict=True))
    program = program_from(attention, samples)
    Pipeline(passes).run(program)
    return sum(math.prod(d.shape_of(n)) for n in program.maps())


def test_attention_loses_the_squares_of_its_queries() -> None:
    passes = tuple(default_pipeline())[:-2]
    without = tuple(p for p in passes if not isinstance(p, DropIdleMaps))
    assert _look_ups(without) - _look_ups(passes) == 4 * 8

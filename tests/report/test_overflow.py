"""What a report says of overflow, in words, as data, and after it was written and read."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from torch import Tensor, nn

from fhe_fx.export.lowered import lowered_from_bytes, lowered_to_bytes
from fhe_fx.ir import Program
from fhe_fx.passes import Pipeline, default_pipeline
from fhe_fx.passes.choose_ranges import ChooseRanges
from fhe_fx.passes.lower_to_integers import LowerToIntegers
from fhe_fx.quant.overflow import Overflow
from fhe_fx.report import Report, report_on
from fhe_fx.report.overflow import EdgeOverflow, sentence, total_error
from tests.programs import program_from, seeded

W = seeded((8, 8), n=1, seed=5)[0]


def _function(x: Tensor) -> Tensor:
    return nn.functional.gelu(x @ W) @ W


def _lowered(estimates_overflow: bool = True) -> Program:
    program = program_from(_function, [(x,) for x in seeded((2, 8), n=24)], n_bits=4)
    ours = {
        ChooseRanges.name: ChooseRanges(rooms=(-0.1,), room=-0.1),
        LowerToIntegers.name: LowerToIntegers(estimates_overflow=estimates_overflow),
    }
    Pipeline(tuple(ours.get(p.name, p) for p in default_pipeline())).run(program)
    return program


def test_each_look_up_input_and_result_is_told() -> None:
    report = report_on([(_lowered(), None)])
    (region,) = report.regions
    known = [n.overflow for n in region.nodes]
    assert all(o is not None and o.n_values == 24 * 16 for o in known)
    assert [(e.kind, e.overflow.n_values) for e in region.edges] == [
        ("input", 24 * 16), ("result", 24 * 16)
    ]  # fmt: skip
    every = [o for o in [*known, *(e.overflow for e in region.edges)] if o is not None]
    squares = sum((o.result_error or 0.0) ** 2 for o in every)
    assert squares > 0
    assert region.overflow_error == pytest.approx(math.sqrt(squares))
    lines = str(report).splitlines()
    column = lines[1].index("overflow") + len("overflow")
    for line, overflow in zip(lines[2:], known, strict=False):
        assert overflow is not None
        assert line[:column].endswith(overflow.text())
    assert lines[-1].strip() == region.overflow_line()
    assert lines[-1].startswith("  error of overflow about ")


def test_a_report_that_was_written_says_the_same() -> None:
    (region,) = report_on([(_lowered(), None)]).regions
    held = json.loads(json.dumps(dataclasses.asdict(region)))
    (again,) = Report.from_costs([held]).regions
    assert (again.nodes, again.edges) == (region.nodes, region.edges)
    assert again.overflow_line() == region.overflow_line()


def test_a_manifest_of_before_has_none() -> None:
    (region,) = report_on([(_lowered(estimates_overflow=False), None)]).regions
    held = json.loads(json.dumps(dataclasses.asdict(region)))
    for name in ("edges", "overflow_error"):
        del held[name]
    for node in held["nodes"]:
        del node["overflow"]
    old = Report.from_costs([held])
    assert old.regions[0] == region
    assert old.regions[0].overflow_line() is None
    assert "error of overflow" not in str(old)


def test_a_lowered_program_that_was_written_says_the_same() -> None:
    program = _lowered()
    captured = program_from(_function, program.samples, n_bits=4)
    again = lowered_from_bytes(lowered_to_bytes(program), captured)
    ours, theirs = (report_on([(p, None)]).regions[0] for p in (again, program))
    assert (ours.nodes, ours.edges) == (theirs.nodes, theirs.edges)


def _overflow(share: float, error: float | None, result: float | None, n: int = 1000) -> Overflow:
    return Overflow(share, share, share, n, error, result)


def test_the_sentence_names_the_worst_that_was_seen() -> None:
    often = _overflow(0.02, 0.5, 0.03)
    rarely = _overflow(0.001, 2.0, 0.04)  # one value in a thousand says little
    harmless = _overflow(0.5, 0.01, 0.001)
    look_ups = [("exp", often), ("square", rarely), ("gelu", harmless), ("relu", None)]
    edges = [
        EdgeOverflow("x", "input", _overflow(0.004, 0.1, None)),
        EdgeOverflow("y", "result", _overflow(0.0, None, 0.0)),
    ]
    total = total_error([o for _, o in look_ups])
    assert total == pytest.approx(math.hypot(0.03, 0.04, 0.001))
    assert sentence(look_ups, edges, total) == (
        "error of overflow about 5 % of the results' deviation; worst exp: 2 % of its values, "
        "which err by 50 % of their size; 0.4 % of input values are clipped"
    )
    assert sentence(look_ups[1:2], [], None) == (
        "error of overflow; worst square: < 0.3 % of its values, which err by 200 % of their size"
    )
    assert sentence([("exp", _overflow(0.0, None, 0.0))], edges, 0.0) is None
    assert sentence([("exp", None)], edges, None) is None

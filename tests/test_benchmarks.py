"""The benchmarks: the law of a growth, what is kept and estimated, and the circuits by hand."""

from __future__ import annotations

import json
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import bench
import numpy as np
import pytest
from growth import Law, digits, laws, series
from hypothesis import given
from hypothesis import strategies as st
from naive import Attention, Head, NaiveAttention, NaiveHead
from tables import markdown, percent

LENGTHS = (6, 8, 16, 32)
coefficients = st.floats(1, 1e12)


def _row(tokens: int, part: str = "one head", **more: Any) -> dict[str, Any]:
    row = {
        "kind": "growth", "part": part, "n_bits": 4, "tokens": tokens, "code": "a",
        "look_ups": 50 * tokens**2 + 40 * tokens, "complexity": 1e9 * tokens**2,
        "clear_error": 0.07, "simulate_error": 0.1, "seconds": 2.0 * tokens, "machine": "M",
    }  # fmt: skip
    return row | more


@given(coefficients, coefficients)
def test_a_law_is_found_again(pairs: float, tokens: float) -> None:
    true = Law(pairs, tokens)
    law = Law.of((n, true(n)) for n in LENGTHS)
    assert law is not None
    assert np.allclose(law(np.arange(6, 64)), true(np.arange(6, 64)))
    assert law.farthest == pytest.approx(0, abs=1e-6)
    assert law.ahead == pytest.approx(0, abs=1e-6)


def test_pairs_below_the_diagonal_are_a_law() -> None:
    law = Law.of((n, n * (n - 1) / 2) for n in LENGTHS)
    assert str(law) == "0.5 T² - 0.5 T"


def test_every_length_counts_alike() -> None:
    true = Law(50, 40)
    costs = {n: true(n) for n in LENGTHS}
    shortest, longest = (
        Law.of((costs | {n: 1.1 * costs[n]}).items()) for n in (LENGTHS[0], LENGTHS[-1])
    )
    assert shortest is not None
    assert longest is not None
    assert shortest(6) / true(6) > 1.02  # absolute deviations would not see it
    assert 0 < abs(longest.farthest) < 0.1
    assert longest.ahead == pytest.approx(0.1)


def test_two_lengths_have_no_law() -> None:
    assert Law.of([(6, 1.0), (8, 2.0), (8, 2.0)]) is None


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.5, "0.5"), (52.94, "52.9"), (1073.1, "1,070"), (5.2745e9, "5.27e9"), (1.4e11, "1.40e11")],
)
def test_three_digits(number: float, text: str) -> None:
    assert digits(number) == text


def test_a_share_that_rounds_to_nothing_has_no_sign() -> None:
    assert [percent(s) for s in (-0.0004, 0.0, 0.0087, -0.24)] == [
        "0.0 %", "0.0 %", "+0.9 %", "-24.0 %",
    ]  # fmt: skip


def test_laws_name_the_lengths_whose_complexity_is_predicted() -> None:
    rows = [_row(n, naive={**_row(n, "one head, by hand"), "look_ups": 7}) for n in (16, 6)]
    rows.append(_row(32, complexity=None, predicted_complexity=1e9 * 32**2))
    rows.append({**_row(8), "left_out": "not done in 1 s"})
    assert {part: [r["tokens"] for r in own] for part, own in series(rows).items()} == {
        "one head": [6, 16, 32],
        "one head, by hand": [6, 16],
    }
    look_ups, complexity = laws(rows)  # of the head by hand there are too few lengths
    assert look_ups["law"] == "50 T² + 40 T"
    assert (look_ups["cost"], look_ups["predicted"]) == ("look_ups", [])
    assert (complexity["cost"], complexity["predicted"]) == ("complexity", [32])
    text = markdown(rows)
    assert "| one head | look-ups | 50 T² + 40 T | 6, 16, 32 |" in text
    assert "| one head | complexity (predicted at 32) |" in text
    assert "- one head, 8 tokens: not done in 1 s." in text


def test_figures_are_drawn_of_measured_and_predicted_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    rows = [_row(n, naive=_row(n, "one head, by hand")) for n in (6, 8)]
    rows.append(_row(16, complexity=None, predicted_complexity=2.6e11))
    bench.write(tmp_path, rows)
    drawn = (tmp_path / "growth.svg").read_text()
    assert "one head: 50 T² + 40 T" in drawn
    assert "one head: predicted, not compiled" in drawn
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["rows"] == rows
    assert data["laws"][0]["law"] == "50 T² + 40 T"


def test_kept_rows_are_not_measured_again_and_those_left_out_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = Namespace(
        tokens="6,8,16",
        head_by_hand="6",
        by_hand="",
        most_look_ups=9,
        execute=False,
        skip_parts=True,
    )
    keys = [key for key in bench.wanted(choices) if key["part"] == bench.HEAD]
    tried = []

    def attempt(key: dict[str, Any], seconds: float) -> dict[str, Any]:
        tried.append(key["tokens"])
        fails = key["tokens"] == 16 and tried.count(16) == 1
        return {**_row(key["tokens"]), **key} | ({"left_out": "no memory"} if fails else {})

    monkeypatch.setattr(bench, "attempt", attempt)
    monkeypatch.setattr(bench, "SECONDS", tmp_path / "none.jsonl")
    for _ in range(3):
        bench.measure(keys, tmp_path / "rows.jsonl", 1)
    assert tried == [6, 8, 16, 16]
    assert [r.get("left_out") for r in bench.newest(bench.read(tmp_path / "rows.jsonl"))] == [
        None, None, None,
    ]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 rows, 0 kept: how long is not known"
    assert lines[-1] == "3 rows, 3 kept: nothing to measure"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (subprocess.TimeoutExpired("row", 7), "not done in 7 s"),
        (
            subprocess.CalledProcessError(1, "row", stderr="Traceback\nValueError: why\n"),
            "ValueError: why",
        ),
        (subprocess.CalledProcessError(-9, "row", stderr="a warning\n"), "ended with -9"),
        (subprocess.CalledProcessError(3, "row", stderr=""), "ended with 3"),
    ],
)
def test_a_row_that_fails_says_why(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(bench, "machine_name", lambda: "M")  # asks a process of its own
    monkeypatch.setattr(subprocess, "run", run)
    found = bench.attempt({"part": "one head"}, 7)
    assert found["left_out"] == reason
    assert found["part"] == "one head"
    assert found["seconds"] >= 0


def test_seconds_are_expected_by_what_the_same_row_took_last() -> None:
    known = [_row(6, code="older", seconds=1.0), _row(8), _row(6)]
    assert bench.expected(_row(6), known) == 12
    assert bench.expected(_row(32), known) is None
    assert bench.expected(_row(8, "12 heads"), known) is None
    assert bench.estimate([_row(6), _row(8), _row(32)], known) == (
        "about 28 s, and 1 of which it is not known"
    )


def test_seconds_are_kept_for_later_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SECONDS", tmp_path / "seconds.jsonl")
    bench.keep_seconds([_row(100), {**_row(6), "left_out": "no memory"}])
    assert bench.estimate([_row(100)], bench.read(bench.SECONDS)) == "about 3 min"
    assert len(bench.read(bench.SECONDS)) == 1


def _head(generator: np.random.Generator, channels: int, width: int) -> Head:
    def linear() -> tuple[Any, Any]:
        return generator.normal(size=(channels, width)), generator.normal(size=width)

    return Head(linear(), linear(), linear())


def test_attention_by_hand_is_near_the_float_one_when_it_has_bits() -> None:
    generator = np.random.default_rng(0)
    heads = tuple(_head(generator, 6, 3) for _ in range(2))
    attention = Attention(heads, (generator.normal(size=(6, 6)), generator.normal(size=6)))
    samples = list(generator.normal(size=(16, 3, 6)) / 3)
    pairs: list[tuple[Head | Attention, NaiveHead | NaiveAttention]] = [
        (heads[0], NaiveHead(heads[0], samples, n_bits=10, msbs=14)),
        (attention, NaiveAttention(attention, samples, n_bits=10, msbs=14)),
    ]
    for layer, circuit in pairs:
        circuit.adjust([circuit.quantize(x) for x in samples])
        x = samples[0]
        found = circuit(circuit.quantize(x)) * circuit.result_scale
        assert np.abs(found - layer(x)).max() < 0.03 * np.abs(layer(x)).max()

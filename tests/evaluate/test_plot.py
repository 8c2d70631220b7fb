"""The figure: both files, everything in it, and what is drawn beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fhe_fx.errors import OptionsError
from fhe_fx.evaluate import Evaluation, plot_accuracy
from fhe_fx.evaluate import plot as module
from fhe_fx.evaluate.published import PUBLISHED

pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'fhe_fx[plots]'")


def test_both_files_are_written(tmp_path: Path, evaluation: Evaluation) -> None:
    png, svg = plot_accuracy(evaluation, tmp_path / "new")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    for label in ("rounded floats", "integers, clear", "simulated with noise", "95 % intervals"):
        assert label in text
    assert "one head of layer 0" in text
    assert "GPT-2, attention of layer 0" not in text


def test_the_whole_is_drawn_beside_the_whole(tmp_path: Path, evaluation: Evaluation) -> None:
    whole = dataclasses.replace(evaluation, heads=None)
    text = plot_accuracy(whole, tmp_path)[1].read_text()
    assert "GPT-2, attention of layer 0" in text
    assert "one head of layer 0" not in text
    alone = plot_accuracy(whole, tmp_path, published=())[1].read_text()
    assert "published" not in alone


def test_the_same_figure_is_the_same_file(tmp_path: Path, evaluation: Evaluation) -> None:
    first = plot_accuracy(evaluation, tmp_path / "a")[1].read_text()
    assert first == plot_accuracy(evaluation, tmp_path / "b")[1].read_text()


def test_one_setting_at_one_stage_can_be_drawn(tmp_path: Path, evaluation: Evaluation) -> None:
    setting = evaluation.settings[0]
    one = dataclasses.replace(setting, stages=setting.stages[1:2])
    plot_accuracy(dataclasses.replace(evaluation, settings=(one,)), tmp_path)


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "can_plot", lambda: False)
    with pytest.raises(OptionsError) as caught:
        plot_accuracy(evaluation, tmp_path)
    assert str(caught.value) == "Plots need matplotlib. Install it: pip install 'fhe_fx[plots]'."


def test_published_series_are_accuracies_of_the_same_bits() -> None:
    for series in PUBLISHED:
        assert set(series.top1) == set(series.top5) == set(range(2, 12))
        assert all(0 < series.top1[b] <= series.top5[b] <= 1 for b in series.top1)

"""The figure of an evaluation: accuracy against bits, with published points beside ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fhe_fx.errors import OptionsError
from fhe_fx.evaluate.published import PUBLISHED, Series
from fhe_fx.evaluate.results import Evaluation, SettingResult

__all__ = ["can_plot", "plot_accuracy"]

_STYLES = {
    "fake_quantized": ("rounded floats", "#9a9a9a", "^", ":"),
    "clear": ("integers, clear", "#1f6fb2", "o", "-"),
    "simulated": ("simulated with noise", "#c2410c", "s", "-"),
}
"""Label, colour, marker and line of each stage; they differ in more than colour."""
_WIDTH, _HEIGHT = 6.3, 3.6  # inches: the text width of a page


def can_plot() -> bool:
    """Say whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_accuracy(
    found: Evaluation, directory: Path, published: Sequence[Series] = PUBLISHED
) -> list[Path]:
    """Draw top-1 agreement against bits, with intervals, as `accuracy.png` and `accuracy.svg`.

    Args:
        found: what to draw.
        directory: where to write.
        published: what to draw beside it, as far as it is of the same kind: heads or the whole.

    Returns:
        The files.

    Raises:
        OptionsError: if matplotlib is not installed.
    """
    if not can_plot():
        raise OptionsError("Plots need matplotlib. Install it: pip install 'fhe_fx[plots]'.")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "fhe_fx",  # the same figure gives the same file
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        _draw(figure.add_subplot(), found, published)
        paths = [directory / f"accuracy.{kind}" for kind in ("png", "svg")]
        directory.mkdir(parents=True, exist_ok=True)
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=300, metadata=metadata)
    return paths


def _draw(axes: Any, found: Evaluation, published: Sequence[Series]) -> None:
    bits = sorted({s.n_bits for s in found.settings})
    lowest = 1.0
    for series in published:
        if series.is_part != (found.heads is not None):
            continue
        own = {b: v for b, v in series.top1.items() if bits[0] <= b <= bits[-1]}
        axes.plot(
            list(own), [100 * v for v in own.values()], color="#555555", marker="x", ls="--",
            lw=1, ms=5, label=series.label,
        )  # fmt: skip
        lowest = min([lowest, *own.values()])
    for stage, style in _STYLES.items():
        ordered = sorted(found.settings, key=lambda s: s.n_bits)
        points = [s for s in ordered if any(r.stage == stage for r in s.stages)]
        if points:
            lowest = min(lowest, _draw_stage(axes, points, stage, style))
    axes.set_xticks(bits)
    axes.set_xlim(bits[0] - 0.35, bits[-1] + 0.35)
    axes.set_ylim(max(0.0, 100 * lowest - 5), 101)
    axes.set_xlabel("bits of an activation (n_bits)")
    axes.set_ylabel("top-1 agreement with float, %")
    part = "" if found.heads is None else f", heads {', '.join(map(str, found.heads))}"
    model = "/".join(Path(found.model).parts[-2:])
    targets = found.parts if len(found.targets) == 1 else f"{len(found.targets)} submodules"
    axes.set_title(
        f"{model}, {targets}{part}\n{found.sentences} sentences, {found.positions} positions, "
        f"at most {found.tokens} tokens; 95 % intervals",
        fontsize=9,
        loc="left",
    )
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right", fontsize=8)


def _draw_stage(
    axes: Any, points: Sequence[SettingResult], stage: str, style: tuple[str, str, str, str]
) -> float:
    """Draw one stage, and return its lowest end."""
    label, colour, marker, line = style
    tops = [s.stage(stage).metrics["top1"] for s in points]
    ends = [
        (t.value if t.low is None else t.low, t.value if t.high is None else t.high) for t in tops
    ]
    reach = [
        [100 * (t.value - low) for t, (low, _) in zip(tops, ends, strict=True)],
        [100 * (high - t.value) for t, (_, high) in zip(tops, ends, strict=True)],
    ]
    shift = (list(_STYLES).index(stage) - 1) * 0.07  # intervals side by side
    axes.errorbar(
        [s.n_bits + shift for s in points], [100 * t.value for t in tops], yerr=reach,
        color=colour, marker=marker, ls=line, lw=1.2, ms=4, capsize=2, elinewidth=0.8, label=label,
    )  # fmt: skip
    return min(low for low, _ in ends)

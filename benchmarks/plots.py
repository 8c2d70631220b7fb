"""The figures of the benchmarks: cost of a look-up, growth with the length, error beside cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from growth import COSTS, Law, price, series
from measure import Row

from fhe_fx.quant.lookup_cost import cost_table

BLUE, ORANGE, GREY, GREEN = "#1f6fb2", "#c2410c", "#6b7280", "#15803d"
STYLES = {
    "one head": (BLUE, "o"), "12 heads": (ORANGE, "s"),
    "one head, by hand": (GREY, "^"), "12 heads, by hand": (GREY, "v"),
}  # fmt: skip
STAGES = {"clear_error": "clear", "simulate_error": "simulated"}
WIDTH, HEIGHT = 6.3, 3.2  # inches: the text width of a page
SETTINGS: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fhe_fx",  # the same figure gives the same file
}


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write every figure as PNG and SVG, and return the files."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    made = []
    with mpl.rc_context(SETTINGS):
        for name, height, paint in (
            ("look_up", HEIGHT, look_up),
            ("growth", 1.7 * HEIGHT, lambda f: growth(f, rows)),
            ("error", HEIGHT, lambda f: error(f, rows)),
        ):
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            paint(figure)
            for ending in ("png", "svg"):
                made.append(out / f"{name}.{ending}")
                metadata = {"Date": None} if ending == "svg" else None
                figure.savefig(made[-1], dpi=200, metadata=metadata)
    return made


def look_up(figure: Any) -> None:
    """Draw the complexity of one look-up against its bits, a line for each `p_error`."""
    axes = figure.add_subplot()
    table = cost_table()
    shown, lowest = (0.01, 0.1, 0.2, 0.4, 0.6, 0.8), np.inf
    for i, p_error in enumerate(shown):
        shade = 1 - 0.75 * i / (len(shown) - 1)
        points = [(b, table.of(b, p_error, 3)) for b in sorted(table.by_bits) if b < 10]
        known = [(b, c) for b, c in points if np.isfinite(c)]
        axes.semilogy(*zip(*known, strict=True), "o-", ms=3, color=BLUE, alpha=shade)
        lowest = min(lowest / 1.3, known[-1][1])  # labels that stand apart
        axes.annotate(
            f"{p_error:g}" if i else f"p_error {p_error:g}", (known[-1][0], lowest),
            xytext=(6, -3), textcoords="offset points", fontsize=8, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlabel("bits that it reads")
    axes.set_ylabel("complexity of one look-up")
    axes.set_xlim(2.8, 9.9)


def growth(figure: Any, rows: Sequence[Row]) -> None:
    """Draw both costs against the length, each with its fitted law, and both errors below."""
    panels = figure.subplots(2, 2, sharex=True, height_ratios=(3, 2))
    grown = series(rows)
    for axes, (name, cost) in zip(panels[0], COSTS.items(), strict=True):
        for part, own in grown.items():
            paint_cost(axes, part, own, cost)
        axes.set_yscale("log")
        axes.set_ylabel(name.replace("_", "-"))
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** (0.12 * len(grown)))  # room for the legend
        axes.legend(fontsize=6.5, frameon=False, loc="upper left", handletextpad=0.3)
    for axes, (stage, name) in zip(panels[1], STAGES.items(), strict=True):
        for part, own in grown.items():
            colour, marker = STYLES[part]
            points = [(r["tokens"], r[stage]) for r in own if r.get(stage) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker + "-", color=colour, ms=4, lw=1)
        axes.set_ylabel(f"relative error, {name}")
        axes.set_xlabel("tokens T")
    panels[1, 0].sharey(panels[1, 1])
    panels[1, 0].set_ylim(0)
    panels[0, 0].set_xscale("log")
    lengths = sorted({r["tokens"] for own in grown.values() for r in own})
    panels[0, 0].set_xticks(lengths, [str(n) for n in lengths])
    for axes in panels.flat:
        axes.minorticks_off()


def paint_cost(axes: Any, part: str, rows: Sequence[Row], cost: Callable[[Row], float]) -> None:
    """Draw the points of one part, hollow where predicted, and the law that was fitted to them."""
    colour, marker = STYLES[part]
    law = Law.of((r["tokens"], cost(r)) for r in rows)
    label = f"{part}: {law}" if law else part
    if law:
        x = np.geomspace(rows[0]["tokens"], rows[-1]["tokens"])
        axes.plot(x, law(x), "-", lw=1, color=colour)
    hollow = [r for r in rows if cost is price and not r.get("complexity")]
    for own, face, text in (
        ([r for r in rows if r not in hollow], colour, label),
        (hollow, "white", f"{part}: predicted, not compiled"),
    ):
        if own:
            points = zip(*[(r["tokens"], cost(r)) for r in own], strict=True)
            axes.plot(*points, marker, color=colour, mfc=face, ms=5, zorder=3, label=text)


def error(figure: Any, rows: Sequence[Row]) -> None:
    """Draw error against cost: parts of the shipped model, heads of both kinds."""
    axes = figure.add_subplot()
    done = [r for r in rows if "left_out" not in r and r.get("simulate_error") is not None]
    for row in [*done, *[r["naive"] for r in done if "naive" in r]]:
        is_part = row["part"] not in STYLES
        colour, marker = STYLES.get(row["part"], (GREEN, "D"))
        place = price(row), row["simulate_error"]
        axes.plot(*place, marker, color=colour, ms=5)
        text = f"{row['part']}, n_bits={row['n_bits']}" if is_part else f"T={row['tokens']}"
        axes.annotate(
            text, place, xytext=(5, 4), textcoords="offset points", fontsize=7, color=colour
        )
    for label, (colour, marker) in STYLES.items():
        axes.plot([], [], marker, color=colour, ms=5, label=f"{label}, random weights")
    axes.plot([], [], "D", color=GREEN, ms=5, label="parts of the shipped GPT-2, T=6")
    axes.set_xscale("log")
    axes.set_ylim(0)
    axes.set_xlabel("complexity")
    axes.set_ylabel("relative error, simulated")
    axes.margins(x=0.2)
    axes.legend(fontsize=7, frameon=False)


__all__ = ["draw"]

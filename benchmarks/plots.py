"""The figures of the benchmarks: cost of a look-up, growth with the length, error beside cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import Row

from fhe_fx.quant.lookup_cost import cost_table

BLUE, ORANGE, GREY, GREEN = "#1f6fb2", "#c2410c", "#6b7280", "#15803d"
STYLES = {"one head": (BLUE, "o"), "12 heads": (ORANGE, "s"), "one head, by hand": (GREY, "^")}
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

    grown = [r for r in rows if r["kind"] == "growth" and "left_out" not in r]
    made = []
    with mpl.rc_context(SETTINGS):
        for name, paint in (
            ("look_up", look_up),
            ("growth", lambda f: growth(f, grown)),
            ("error", lambda f: error(f, rows)),
        ):
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
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


def law(rows: Sequence[Row]) -> tuple[float, float]:
    """Return factor and exponent of the power of the length that the complexity follows."""
    tokens, costs = np.log([[r["tokens"], price(r)] for r in rows]).T
    exponent, factor = np.polyfit(tokens, costs, 1)
    return float(np.exp(factor)), float(exponent)


def price(row: Row) -> float:
    """Return the complexity, predicted where it was not compiled."""
    return float(row.get("complexity") or row["predicted_complexity"])


def series(grown: Sequence[Row]) -> dict[str, list[Row]]:
    """Return rows by what they are of, circuits by hand last, in order of the length."""
    by_hand = [r["naive"] for r in grown if "naive" in r]
    found: dict[str, list[Row]] = {}
    for row in sorted([*grown, *by_hand], key=lambda r: (len(r["part"]) > 10, r["tokens"])):
        found.setdefault(row["part"], []).append(row)
    return found


def growth(figure: Any, grown: Sequence[Row]) -> None:
    """Draw complexity against the length with its fitted law, and the errors beside it."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for part, rows in series(grown).items():
        colour, marker = STYLES[part]
        for row in rows:
            face = colour if row.get("complexity") else "white"
            left.plot(
                row["tokens"], price(row), marker, color=colour, mfc=face, ms=5, zorder=3
            )  # fmt: skip
        label = part
        if len(rows) > 1:
            factor, exponent = law(rows)
            x = np.linspace(rows[0]["tokens"], rows[-1]["tokens"])
            left.plot(x, factor * x**exponent, "-", lw=1, color=colour)
            digits, power = f"{factor:.1e}".split("e")
            label += rf": ${digits}\times10^{{{int(power)}}}\,T^{{{exponent:.2f}}}$"
        left.plot([], [], marker, color=colour, label=label, ms=5)
        for stage, style in (("clear_error", ":"), ("simulate_error", "-")):
            points = [(r["tokens"], r[stage]) for r in rows if r.get(stage) is not None]
            if points:
                right.plot(
                    *zip(*points, strict=True), marker + style, color=colour, ms=4, lw=1,
                    mfc=colour if stage == "simulate_error" else "white",
                )  # fmt: skip
    lengths = sorted({r["tokens"] for r in grown})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens T")
    left.set_yscale("log")
    left.set_ylabel("complexity")
    if any(not r.get("complexity") for r in grown):
        left.plot([], [], "o", color="black", mfc="white", ms=5, label="predicted, not compiled")
    left.legend(fontsize=7, frameon=False)
    right.set_ylim(0)
    right.set_ylabel("relative error, held-out inputs")
    right.plot([], [], "k-", lw=1, label="simulated")
    right.plot([], [], "k:", lw=1, label="clear")
    right.legend(fontsize=7, frameon=False)


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

"""The rows of the benchmarks as Markdown, each cost beside its error."""

from __future__ import annotations

from collections.abc import Sequence

from growth import laws
from measure import Row

HEADER = (
    "part", "tokens", "n_bits", "look-ups", "complexity", "keys, MB", "error, clear",
    "error, simulated", "error, executed", "same next token", "memory, GB", "",
)  # fmt: skip
LAW_HEADER = ("part", "cost", "law", "fitted to T", "farthest point", "longest length")


def markdown(rows: Sequence[Row]) -> str:
    """Return the table of rows, circuits written by hand below ours."""
    lines: list[tuple[str, ...]] = []
    left_out: list[str] = []
    for row in rows:
        if "left_out" in row:
            left_out.append(f"{row['part']}, {row.get('tokens', '')} tokens: {row['left_out']}.")
            continue
        lines.append(cells(row))
        if "naive" in row:
            lines.append(cells(row["naive"]))
    machines = sorted({row["machine"] for row in rows if "machine" in row})
    text = [f"Measured on {', '.join(machines)}.", "", line(HEADER), "|---" * len(HEADER) + "|"]
    text += [line(c) for c in lines]
    text += growth(laws(rows))
    if left_out:
        text += ["", "Left out:", "", *[f"- {reason}" for reason in left_out]]
    return "\n".join(text) + "\n"


def cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a row; a complexity that is predicted is marked."""
    complexity, is_predicted = row.get("complexity"), row.get("complexity") is None
    if is_predicted:
        complexity = row["predicted_complexity"]
    keys = row.get("key_bytes")
    agreement = row.get("next_token_agreement")
    return (
        str(row["part"]), str(row["tokens"]), str(row["n_bits"]), f"{row['look_ups']:,}",
        ("about " if is_predicted else "") + f"{complexity:.1e}".replace("e+", "e"),
        "" if keys is None else f"{keys / 1e6:,.0f}",
        *[
            "" if row.get(name) is None else f"{row[name]:.3g}"
            for name in ("clear_error", "simulate_error", "execute_error")
        ],
        "" if agreement is None else f"{100 * agreement:.1f} %",
        "" if row.get("peak_gigabytes") is None else f"{row['peak_gigabytes']:.1f}",
        "predicted, not compiled" if is_predicted else "",
    )  # fmt: skip


def growth(found: Sequence[Row]) -> list[str]:
    """Return the table of fitted laws, each with how well it holds."""
    if not found:
        return []
    text = [
        "", "Growth with T tokens, by least squares of the relative deviations. The last column is",
        "how far the longest length is from the law of the shorter ones alone.", "",
        line(LAW_HEADER), "|---" * len(LAW_HEADER) + "|",
    ]  # fmt: skip
    for law in found:
        cost = law["cost"].replace("_", "-")
        if law["predicted"]:
            cost += f" (predicted at {', '.join(map(str, law['predicted']))})"
        lengths = ", ".join(map(str, law["lengths"]))
        shares = [percent(law[name]) for name in ("farthest", "ahead")]
        text.append(line((law["part"], cost, law["law"], lengths, *shares)))
    return text


def percent(share: float) -> str:
    """Return a signed share to a tenth of a percent; what rounds to nothing has no sign."""
    rounded = round(100 * share, 1)
    return f"{rounded:+} %" if rounded else "0.0 %"


def line(cells: Sequence[str]) -> str:
    """Return a line of the table."""
    return "| " + " | ".join(cells) + " |"

"""One self-contained page: the graph at each step of a lowering, to be looked through."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fhe_fx.report.page.drawing import COLOURS, LEVELS, drawing

__all__ = ["Measure", "to_page"]


@dataclass(frozen=True)
class Measure:
    """A number for each node, by which a page colours it."""

    name: str
    """What it is, as the page calls it, such as "error"."""
    values: Mapping[str, float]
    """By node name; nodes without one stay grey."""
    unit: str = ""
    """Written behind the number."""


def to_page(
    snapshots: Sequence[Mapping[str, Any]], *, title: str = "", measures: Sequence[Measure] = ()
) -> str:
    """Write a page.

    Nothing is loaded from elsewhere: it may be sent, and opened without a network.

    Args:
        snapshots: of `ir.snapshot.snapshot`, in order, each with the `pass` that made it and its
            `notes` if there are any.
        title: of the page; by default the program's name.
        measures: numbers by which nodes of the last snapshot may be coloured besides kind, width
            and cost; the first one is shown at first.
    """
    steps = []
    for shot in snapshots:
        drawings = {level: drawing(shot, level) for level in LEVELS}
        steps.append({"pass": "", "notes": [], **shot, "drawings": drawings})
    data = {
        "steps": steps,
        "levels": LEVELS,
        "colours": COLOURS,
        "measures": [{"name": m.name, "unit": m.unit, "values": dict(m.values)} for m in measures],
    }
    # No text of a model may end the script or open a tag.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = files("fhe_fx.report.page").joinpath("page.html").read_text(encoding="utf-8")
    name = html.escape(title or (str(snapshots[-1]["name"]) if snapshots else "fhe_fx"))
    return template.replace("{{title}}", name).replace("{{data}}", text)

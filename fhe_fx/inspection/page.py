"""An inspection as one HTML file: each graph as a picture, coloured by error or by cost.

Everything is in the file, and it has no script: two radio buttons choose the colours, and a node of
the picture leads to its row of the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from fhe_fx.inspection.results import Inspection, NodeErrors, RegionErrors

__all__ = ["page"]

_COLOURS = ("#fff7ec", "#fee8c8", "#fdd49e", "#fdbb84", "#fc8d59", "#ef6548", "#d7301f", "#990000")
"""ColorBrewer's sequential OrRd: its lightness tells the order without its hue."""
_LIGHT_TEXT_FROM = 5
_ERRORS = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_COSTS = (0.001, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4)
"""Where one colour ends and the next begins."""
_WIDTH, _HEIGHT, _ACROSS, _DOWN, _EDGE = 196, 46, 14, 30, 12
"""Boxes, the space between them, and the border, in pixels."""


def page(inspection: Inspection) -> str:
    """Return the page."""
    regions = "\n".join(_region(r, k) for k, r in enumerate(inspection.regions))
    return _PAGE.replace("{rules}", _rules()).replace("{regions}", regions)


def _rules() -> str:
    lines = []
    for kind in ("error", "cost"):
        for level, colour in enumerate(_COLOURS):
            text = "#fff" if level >= _LIGHT_TEXT_FROM else "#222"
            of = f"#by-{kind}:checked ~ main .{kind}{level}"
            lines.append(f"{of} rect {{ fill: {colour} }} {of} text {{ fill: {text} }}")
        lines.append(f"#by-{kind}:checked ~ .keys .key-{kind} {{ display: inline }}")
    return "\n".join(lines)


def _region(region: RegionErrors, number: int) -> str:
    headline, *notes = region.headline()
    notes += [f"Warning: {text}" for text in region.warnings]
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        f"<section><h2>{escape(headline)}</h2>{said}"
        f'<div class="both"><div class="graph">{_graph(region, number)}</div>'
        f'<div class="table">{_table(region, number)}</div></div></section>'
    )


# The picture ----------------------------------------------------------------------------------


def _drawn(region: RegionErrors) -> list[NodeErrors]:
    """Return the nodes of the picture: not those that only prepare what a look-up reads."""
    read = {name for n in region.nodes for name in n.reads}
    return [n for n in region.major if n.operator != "shift" or n.node not in read]


def _edges(region: RegionErrors) -> dict[str, list[str]]:
    """Return, for each node of the picture, those that it reads, past what is left out."""
    drawn = {n.node for n in _drawn(region)}
    behind: dict[str, list[str]] = {}
    for n in region.nodes:  # in order, so what a node reads is known before it
        found: list[str] = []
        for name in n.reads:
            found += [name] if name in drawn else behind.get(name, [])
        behind[n.node] = list(dict.fromkeys(found))
    return {name: reads for name, reads in behind.items() if name in drawn}


def _places(edges: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, int]]:
    """Return column and layer of each node.

    A node stands one layer below the lowest that it reads, and inputs above what reads them first.
    In a layer, nodes are ordered by the mean column of what they read.
    """
    layer: dict[str, int] = {}
    for name, reads in edges.items():
        layer[name] = 1 + max((layer[r] for r in reads), default=-1)
    for name, reads in edges.items():
        readers = [layer[other] for other, read in edges.items() if name in read]
        if not reads and readers:
            layer[name] = min(readers) - 1
    rows: dict[int, list[str]] = {}
    for name, depth in layer.items():
        rows.setdefault(depth, []).append(name)
    column: dict[str, float] = {}
    for depth in sorted(rows):

        def mean(name: str) -> float:
            known = [column[r] for r in edges[name] if r in column]
            return sum(known) / len(known) if known else math.inf

        row = sorted(rows[depth], key=mean)
        for k, name in enumerate(row):
            column[name] = k - (len(row) - 1) / 2
    return {name: (column[name], layer[name]) for name in layer}


def _graph(region: RegionErrors, number: int) -> str:
    edges = _edges(region)
    places = _places(edges)
    if not places:
        return ""
    left = min(c for c, _ in places.values())
    width = 2 * _EDGE + (max(c for c, _ in places.values()) - left) * (_WIDTH + _ACROSS) + _WIDTH
    height = 2 * _EDGE + max(r for _, r in places.values()) * (_HEIGHT + _DOWN) + _HEIGHT
    at = {
        name: (_EDGE + (c - left) * (_WIDTH + _ACROSS), _EDGE + r * (_HEIGHT + _DOWN))
        for name, (c, r) in places.items()
    }
    lines = [_line(at[r], at[name]) for name, reads in edges.items() for r in reads]
    boxes = [_box(n, at[n.node], n is region.first, number) for n in _drawn(region)]
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {size} role="img">{"".join(lines)}{"".join(boxes)}</svg>'


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    x, y = start[0] + _WIDTH / 2, start[1] + _HEIGHT
    to_x, to_y = end[0] + _WIDTH / 2, end[1]
    bend = (y + to_y) / 2
    return (
        f'<path d="M{x:.0f} {y:.0f} C{x:.0f} {bend:.0f} {to_x:.0f} {bend:.0f} {to_x:.0f} {to_y}"/>'
    )


def _level(value: float, ends: Sequence[float]) -> int:
    return sum(value > end for end in ends)


def _box(n: NodeErrors, at: tuple[float, float], is_first: bool, number: int) -> str:
    classes = f"error{_level(n.relative_error, _ERRORS)} cost{_level(n.cost, _COSTS)}"
    x, y = at
    cost = f" · {n.look_ups:,} look-ups" if n.look_ups else ""
    outside = f" · {n.outside_share:.1%} out" if n.outside_share >= 0.0005 else ""
    first = " first" if is_first else ""
    return (
        f'<a href="#r{number}-{escape(n.node)}" class="{classes}{first}">'
        f"<title>{escape(_details(n))}</title>"
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
        f'<text x="{x + 8:.0f}" y="{y + 18:.0f}">{escape(_short(n.operator))}</text>'
        f'<text class="small" x="{x + 8:.0f}" y="{y + 36:.0f}">'
        f"{n.relative_error:.3f}{cost}{outside}</text></a>"
    )


def _short(text: str, most: int = 25) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _details(n: NodeErrors) -> str:
    slots = "" if n.slots is None else f", {n.slots:.2f} slots"
    return (
        f"{n.node}: {n.operator}\n{n.module_path} {n.source}\n"
        f"float {n.float_low:.4g} to {n.float_high:.4g}, range {n.low:.4g} to {n.high:.4g}\n"
        f"error {n.error:.3g}, relative {n.relative_error:.3f}{slots}\n"
        f"{n.outside:,} of {n.values:,} outside; {n.look_ups:,} look-ups, {n.cost:.1%} of the cost"
    )


# The table ------------------------------------------------------------------------------------

_HEADS = ("node", "operator", "relative error", "slots", "outside", "cost", "look-ups", "bits",
          "float", "range", "module, source")  # fmt: skip


def _table(region: RegionErrors, number: int) -> str:
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    rows = "".join(_row(n, n is region.first, number) for n in region.major)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _row(n: NodeErrors, is_first: bool, number: int) -> str:
    bits = str(n.bits) if n.lookup_bits is None else f"{n.lookup_bits} read, {n.bits} out"
    cells = (
        n.node,
        n.operator,
        f"{n.relative_error:.3f}",
        "" if n.slots is None else f"{n.slots:.2f}",
        f"{n.outside:,} ({n.outside_share:.2%})" if n.outside else "",
        f"{n.cost:.1%}" if n.look_ups else "",
        f"{n.look_ups:,}" if n.look_ups else "",
        bits,
        f"{n.float_low:.3g} … {n.float_high:.3g}",
        f"{n.low:.3g} … {n.high:.3g}",
        f"{n.module_path} {n.source}",
    )
    shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    first = ' class="first"' if is_first else ""
    return f'<tr id="r{number}-{escape(n.node)}"{first}>{shown}</tr>'


def _key(ends: Sequence[float], kind: str) -> str:
    steps = [f"≤ {ends[0]:g}", *(f"≤ {end:g}" for end in ends[1:]), f"> {ends[-1]:g}"]
    boxes = "".join(
        f'<span class="box" style="background:{colour}"></span>{step} '
        for colour, step in zip(_COLOURS, steps, strict=True)
    )
    return f'<span class="key-{kind}">{boxes}</span>'


_PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fhe_fx inspection</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 14px/1.45 system-ui, sans-serif; color: #222; margin: 1.5rem; }}
h1 {{ font-size: 1.3rem; margin: 0 0 .5rem }} h2 {{ font-size: 1.05rem; margin: 1.5rem 0 .3rem }}
p {{ margin: .2rem 0 }} label {{ margin-right: 1rem }} .keys {{ margin: .5rem 0 }}
.keys span[class^=key] {{ display: none }}
.box {{ display: inline-block; width: 1em; height: 1em; border: 1px solid #999;
  margin: 0 .3em -.15em .7em }}
.both {{ display: flex; gap: 1rem; align-items: flex-start; margin-top: .8rem }}
.graph, .table {{ max-height: 85vh; overflow: auto; border: 1px solid #ddd }}
.graph {{ flex: 1 1 58%; min-width: 320px }} .table {{ flex: 1 1 42% }}
svg text {{ font-size: 12.5px }} svg .small {{ font-size: 11px }}
svg path {{ fill: none; stroke: #999 }} rect {{ stroke: #888 }}
svg .first rect {{ stroke: #000; stroke-width: 3 }}
table {{ border-collapse: collapse; font-size: 12.5px; white-space: nowrap }}
th, td {{ padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #eee }}
th {{ position: sticky; top: 0; background: #f5f5f5 }}
th:nth-child(-n+2), td:nth-child(-n+2), th:last-child, td:last-child {{ text-align: left }}
tr.first td {{ font-weight: 600 }} tr:target td {{ background: #fff3b0 }}
{{rules}}
</style></head><body>
<h1>Float beside integer, node by node</h1>
<input type="radio" name="by" id="by-error" checked><label for="by-error">by relative error</label>
<input type="radio" name="by" id="by-cost"><label for="by-cost">by share of the cost</label>
<div class="keys">{_key(_ERRORS, "error")}{_key(_COSTS, "cost")}</div>
<p>A box gives operator, relative error, look-ups, and values outside their range; the one with a
thick border is the first above the threshold. Boxes lead to their row of the table.</p>
<main>
{{regions}}
</main></body></html>
"""

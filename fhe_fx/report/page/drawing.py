"""A program, folded to a level, as boxes and edges with coordinates, and as SVG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from fhe_fx.report.page.layout import layered

__all__ = ["COLOURS", "LEVELS", "drawing", "to_svg"]

LEVELS = ("modules", "lines", "nodes")
"""How far a graph is folded: a box for each module, each source line, or each node."""
COLOURS = {
    "client": "#dfeaf7",
    "input": "#cfe3d4",
    "affine": "#eef1f4",
    "move": "#f7f8f9",
    "map": "#f6d9a8",
    "look-up": "#f3b38d",
    "product": "#e9a3b4",
    "softmax": "#e9a3b4",
}
"""Of boxes, by what they hold: the kinds of `ir.snapshot`, and what the client computes."""
_RANK = ("product", "softmax", "look-up", "map", "affine", "move", "input", "client")
BEFORE, AFTER = " client before", " client after"
_LETTER, _LINE, _PAD = 6.6, 15.0, 9.0


def drawing(snapshot: Mapping[str, Any], level: str) -> dict[str, Any]:
    """Fold a snapshot to a level and lay it out.

    Args:
        snapshot: of `ir.snapshot.snapshot`.
        level: one of `LEVELS`.

    Returns:
        `width`, `height`, `boxes` (with the numbers of the nodes that they hold) and `edges`.
    """
    groups = _groups(snapshot, level)
    of = {i: key for key, members in groups.items() for i in members}
    number = {n["name"]: i for i, n in enumerate(snapshot["nodes"])}
    edges: dict[tuple[str, str], dict[str, Any]] = {}

    def join(a: str, b: str, source: Mapping[str, Any]) -> None:
        edge = edges.setdefault((a, b), {"bits": None, "tensors": []})
        if source["name"] not in edge["tensors"]:
            edge["tensors"].append(source["name"])
        known = [x for x in (edge["bits"], source["bits"]) if x is not None]
        edge["bits"] = max(known, default=None)

    for i, node in enumerate(snapshot["nodes"]):
        if node["kind"] == "input":
            join(BEFORE, of[i], node)
        for name in node["inputs"]:
            if of[number[name]] != of[i]:
                join(of[number[name]], of[i], snapshot["nodes"][number[name]])
    for name in snapshot["results"]:
        join(of[number[name]], AFTER, snapshot["nodes"][number[name]])
    boxes = {BEFORE: _client("client, float", "quantize, encrypt")}
    boxes |= {k: _box(k, m, snapshot, level) for k, m in groups.items()}
    boxes[AFTER] = _client("client, float", "decrypt, scale")
    layout = layered({k: (b["w"], b["h"]) for k, b in boxes.items()}, list(edges))
    for key, box in boxes.items():
        box["x"], box["y"] = (round(v, 1) for v in layout.places[key])
    drawn = [
        {"path": _path(layout.paths[pair]), "end": layout.paths[pair][-1], **edge}
        for pair, edge in edges.items()
    ]
    return {
        "width": round(layout.width, 1),
        "height": round(layout.height, 1),
        "boxes": list(boxes.values()),
        "edges": drawn,
    }


def _groups(snapshot: Mapping[str, Any], level: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, node in enumerate(snapshot["nodes"]):
        module, source = node["module_path"] or snapshot["name"], node["source"]
        if node["kind"] == "input" or level == "nodes":
            key = node["name"]
        else:
            key = module if level == "modules" else f"{module}\n{source}"
        groups.setdefault(key, []).append(i)
    return groups


def _client(*lines: str) -> dict[str, Any]:
    return {**_sized(list(lines)), "kind": "client", "members": [], "bits": None, "look_ups": 0}


def _box(
    key: str, members: Sequence[int], snapshot: Mapping[str, Any], level: str
) -> dict[str, Any]:
    nodes = [snapshot["nodes"][i] for i in members]
    look_ups = sum(n["look_ups"] for n in nodes)
    bits = max((n["bits"] for n in nodes if n["bits"] is not None), default=None)
    if level == "nodes" or nodes[0]["kind"] == "input":
        head, second = [nodes[0]["operator"]], nodes[0]["type"]
    else:
        module, _, source = key.partition("\n")
        head = [_tail(module, 30), *([source] if source else [])]
        second = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    cost = [f"{look_ups:,} look-ups"] if look_ups else []
    kinds = {n["kind"] for n in nodes}
    return {
        **_sized([*head, second, *cost]),
        "kind": next(k for k in _RANK if k in kinds),
        "members": list(members),
        "bits": bits,
        "look_ups": look_ups,
    }


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[-length + 1 :]


def _sized(lines: list[str]) -> dict[str, Any]:
    lines = [_tail(line, 34) if i else line[:34] for i, line in enumerate(lines) if line]
    width = max(len(line) for line in lines) * _LETTER + 2 * _PAD
    return {"lines": lines, "w": round(max(width, 60.0), 1), "h": len(lines) * _LINE + _PAD}


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Draw smooth curves that leave and arrive upright."""
    (x, y), *rest = points
    text = f"M{x:.1f} {y:.1f}"
    for nx, ny in rest:
        bend = (ny - y) / 2
        text += f"C{x:.1f} {y + bend:.1f} {nx:.1f} {ny - bend:.1f} {nx:.1f} {ny:.1f}"
        x, y = nx, ny
    return text


def to_svg(
    snapshot: Mapping[str, Any],
    level: str = "nodes",
    *,
    colours: Mapping[str, str] | None = None,
) -> str:
    """Draw a snapshot as a picture of its own, for papers.

    Args:
        snapshot: of `ir.snapshot.snapshot`.
        level: one of `LEVELS`.
        colours: of nodes by name, in place of those by kind; a box takes its first node's.
    """
    drawn = drawing(snapshot, level)
    margin = 12
    width, height = drawn["width"] + 2 * margin, drawn["height"] + 2 * margin
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"',
        f' viewBox="{-margin} {-margin} {width} {height}"',
        ' font-family="ui-monospace, monospace" font-size="11">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"',
        ' markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#8a94a0"/>',
        "</marker></defs>",
    ]
    for edge in drawn["edges"]:
        parts.append(
            f'<path d="{edge["path"]}" fill="none" stroke="#8a94a0" marker-end="url(#tip)"/>'
        )
        if edge["bits"] is not None:
            x, y = edge["end"]
            parts.append(
                f'<text x="{x + 4:.1f}" y="{y - 9:.1f}" fill="#5b6570">{edge["bits"]}</text>'
            )
    for box in drawn["boxes"]:
        named = [snapshot["nodes"][i]["name"] for i in box["members"]]
        given = next((colours[n] for n in named if n in colours), None) if colours else None
        parts.append(
            f'<rect x="{box["x"]}" y="{box["y"]}" width="{box["w"]}" height="{box["h"]}" rx="5" '
            f'fill="{given or COLOURS[box["kind"]]}" stroke="#5b6570"/>'
        )
        for i, line in enumerate(box["lines"]):
            x, y = box["x"] + box["w"] / 2, box["y"] + 15 + i * _LINE
            weight = "bold" if i == 0 else "normal"
            parts.append(
                f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" font-weight="{weight}">'
                f"{html.escape(line)}</text>"
            )
    return "\n".join([*parts, "</svg>", ""])

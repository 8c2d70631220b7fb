"""Places the boxes of a graph in layers, and draws its edges between them.

The usual four steps (Sugiyama, Tagawa, Toda 1981, "Methods for Visual Understanding of Hierarchical
System Structures"): a layer for each box by its longest path, a point in each layer that an edge
crosses, an order by the mean place of neighbours, and coordinates.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Layout", "layered"]

GAP_X, GAP_Y, POINT = 22.0, 46.0, 14.0
"""Between boxes, between layers, and the width that an edge takes in a layer; in pixels."""
SWEEPS = 8


@dataclass(frozen=True)
class Layout:
    """Where everything is, in pixels."""

    places: dict[str, tuple[float, float]]
    """Upper left corner of each box."""
    paths: dict[tuple[str, str], list[tuple[float, float]]]
    """Points of each edge, from the lower side of one box to the upper side of the other."""
    width: float
    height: float


def layered(sizes: Mapping[str, tuple[float, float]], edges: Sequence[tuple[str, str]]) -> Layout:
    """Lay out a graph from top to bottom.

    Args:
        sizes: width and height of each box, in an order in which most edges go forwards.
        edges: pairs of boxes; those that go backwards in that order are drawn upwards.
    """
    order = {name: i for i, name in enumerate(sizes)}
    forwards = [(a, b) for a, b in edges if order[a] < order[b]]
    layer = _layers(list(sizes), forwards)
    rows, chains = _rows(list(sizes), layer, forwards)
    _sort(rows, chains)
    widths = {name: size[0] for name, size in sizes.items()}
    centres = _centres(rows, widths, chains)
    tops, height = _tops(rows, sizes)
    places = {n: (centres[n] - sizes[n][0] / 2, tops[layer[n]]) for n in sizes}
    paths = {}
    for (a, b), chain in chains.items():
        middle = [(centres[p], tops[layer[a] + 1 + i]) for i, p in enumerate(chain[1:-1])]
        start = (centres[a], places[a][1] + sizes[a][1])
        paths[a, b] = [start, *middle, (centres[b], places[b][1])]
    for a, b in edges:
        if order[a] > order[b]:
            side = places[a][0] + sizes[a][0]
            middles = [places[n][1] + sizes[n][1] / 2 for n in (a, b)]
            paths[a, b] = [(side, middles[0]), (places[b][0] + sizes[b][0], middles[1])]
    ends = [places[n][0] + sizes[n][0] for n in sizes]
    ends += [x for path in paths.values() for x, _ in path]
    return Layout(places, paths, max(ends, default=0.0), height)


def _layers(names: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Put each box below all that it reads, and inputs just above their first reader."""
    before: dict[str, list[str]] = {n: [] for n in names}
    after: dict[str, list[str]] = {n: [] for n in names}
    for a, b in edges:
        before[b].append(a)
        after[a].append(b)
    layer: dict[str, int] = {}
    for n in names:
        layer[n] = max((layer[a] + 1 for a in before[n]), default=0)
    for n in reversed(names):
        if not before[n] and after[n]:
            layer[n] = min(layer[b] for b in after[n]) - 1
    return layer


def _rows(
    names: Sequence[str], layer: Mapping[str, int], edges: Sequence[tuple[str, str]]
) -> tuple[list[list[str]], dict[tuple[str, str], list[str]]]:
    """Return the boxes and points of each layer, and the chain of them that each edge is."""
    rows: list[list[str]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for n in names:
        rows[layer[n]].append(n)
    chains = {}
    for a, b in edges:
        points = []
        for i in range(layer[a] + 1, layer[b]):
            # Edges out of one box share their points, so that they run together.
            point = f"{a}\0{i}"
            if point not in rows[i]:
                rows[i].append(point)
            points.append(point)
        chains[a, b] = [a, *points, b]
    return rows, chains


def _sort(rows: list[list[str]], chains: Mapping[tuple[str, str], list[str]]) -> None:
    """Order each row by the mean place of what its members are joined to above, then below."""
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for chain in chains.values():
        for a, b in itertools.pairwise(chain):
            below.setdefault(a, []).append(b)
            above.setdefault(b, []).append(a)
    for sweep in range(SWEEPS):
        near = above if sweep % 2 == 0 else below
        place = {n: i / max(1, len(row) - 1) for row in rows for i, n in enumerate(row)}
        for row in rows if sweep % 2 == 0 else reversed(rows):
            means = _means(row, near, place)
            row.sort(key=means.__getitem__)
            place.update({n: i / max(1, len(row) - 1) for i, n in enumerate(row)})


def _means(
    row: Sequence[str], joined: Mapping[str, Sequence[str]], place: Mapping[str, float]
) -> dict[str, float]:
    """Return the mean place of what each member is joined to, or its own."""
    found = {n: [place[m] for m in joined.get(n, ())] or [place[n]] for n in row}
    return {n: sum(places) / len(places) for n, places in found.items()}


def _centres(
    rows: Sequence[Sequence[str]],
    widths: Mapping[str, float],
    chains: Mapping[tuple[str, str], Sequence[str]],
) -> dict[str, float]:
    """Put members of a row under what they are joined to, without overlaps."""
    joined: dict[str, list[str]] = {}
    for chain in chains.values():
        for a, b in itertools.pairwise(chain):
            joined.setdefault(b, []).append(a)
            joined.setdefault(a, []).append(b)
    wanted: dict[str, float] = {}
    for row in rows:
        _spread(row, widths, dict.fromkeys(row, 0.0), wanted)
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(list(rows)):
            _spread(row, widths, _means(row, joined, wanted), wanted)
    left = min((wanted[n] - widths.get(n, POINT) / 2 for row in rows for n in row), default=0.0)
    return {n: x - left for n, x in wanted.items()}


def _spread(
    row: Sequence[str],
    widths: Mapping[str, float],
    means: Mapping[str, float],
    centres: dict[str, float],
) -> None:
    """Give each member its mean where there is room, moved as little as the order allows."""
    at: list[float] = []
    for i, n in enumerate(row):
        least = means[n]
        if i:
            room = (widths.get(row[i - 1], POINT) + widths.get(n, POINT)) / 2 + GAP_X
            least = max(least, at[-1] + room)
        at.append(least)
    drift = sum(x - means[n] for x, n in zip(at, row, strict=True)) / max(1, len(row))
    for x, n in zip(at, row, strict=True):
        centres[n] = x - drift


def _tops(
    rows: Sequence[Sequence[str]], sizes: Mapping[str, tuple[float, float]]
) -> tuple[list[float], float]:
    tops, y = [], 0.0
    for row in rows:
        tops.append(y)
        y += max((sizes[n][1] for n in row if n in sizes), default=0.0) + GAP_Y
    return tops, max(0.0, y - GAP_Y)

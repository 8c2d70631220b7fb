"""What of a region's values lies outside its ranges, as the lowering estimated it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.program import Program
from fhe_fx.quant.overflow import Overflow, percent

__all__ = [
    "EdgeOverflow",
    "edges_of",
    "expected_outside",
    "overflow_of",
    "sentence",
    "total_error",
]


@dataclass(frozen=True)
class EdgeOverflow:
    """An encrypted input, which the client clips, or a result, which wraps."""

    node: str
    kind: str
    """"input" or "result"."""
    overflow: Overflow

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> EdgeOverflow:
        """Read what `dataclasses.asdict` wrote."""
        return EdgeOverflow(fields["node"], fields["kind"], Overflow(**fields["overflow"]))


def overflow_of(node: fx.Node, key: str = "overflow") -> Overflow | None:
    """Return what a node of an integer program says of its overflow, if it says it.

    Args:
        node: an input, a look-up or a result.
        key: "result_overflow" for what a node is as a result.
    """
    return Overflow(**json.loads(node.meta[key])) if key in node.meta else None


def edges_of(program: Program) -> tuple[EdgeOverflow, ...]:
    """List the inputs and results of an integer program that say it."""
    ports = [(n, "input", "overflow") for n in program.placeholders if not d.is_clear(n)]
    ports += [(n, "result", "result_overflow") for n in program.results]
    found = [(n.name, kind, overflow_of(n, key)) for n, kind, key in ports]
    return tuple(EdgeOverflow(name, kind, o) for name, kind, o in found if o is not None)


def expected_outside(node: fx.Node) -> float | None:
    """Return the expected share of a node's values outside its range, its own noise left aside."""
    is_read = node.op == "placeholder" or d.is_call(node, LOOKUP)
    found = overflow_of(node, "overflow" if is_read else "result_overflow")
    return None if found is None else found.values_outside


def total_error(overflows: Iterable[Overflow | None]) -> float | None:
    """Return the error that all make in the results, which add up as independent errors do."""
    errors = [o.result_error for o in overflows if o is not None and o.result_error is not None]
    return math.sqrt(sum(e * e for e in errors)) if errors else None


def sentence(
    look_ups: Iterable[tuple[str, Overflow | None]],
    edges: Iterable[EdgeOverflow],
    total: float | None,
) -> str | None:
    """Say in one line how much overflow remains, and where most of it does.

    Args:
        look_ups: each with the words that name it.
        edges: inputs and results.
        total: as `total_error` gives it.

    Returns:
        The line, or None where nothing is known, or nothing is expected to overflow.
    """
    known = [(name, o) for name, o in look_ups if o is not None and o.probability]
    if not known:
        return None
    seen = [(name, o) for name, o in known if o.is_seen] or known
    name, worst = max(seen, key=lambda k: (k[1].result_error or 0.0, k[1].probability))
    made = "" if total is None else f" about {percent(total)} of the results' deviation"
    size = "" if worst.error is None else f", which err by {percent(worst.error)} of their size"
    text = f"error of overflow{made}; worst {name}: {worst.text()} of its values{size}"
    for kind, what in (("input", "clipped"), ("result", "wrapped")):
        most = max(
            (e.overflow for e in edges if e.kind == kind), key=lambda o: o.probability, default=None
        )
        if most is not None and most.is_seen:
            text += f"; {percent(most.probability)} of {kind} values are {what}"
    return text

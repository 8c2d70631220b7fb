"""Two compilations side by side: which nodes one has that the other has not, and which differ."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Change", "Comparison", "compare_snapshots"]

_COMPARED = ("type", "bounds", "reads_bits", "rounds_away", "tables", "table")


@dataclass(frozen=True)
class Change:
    """A node of one program or of both."""

    kind: str
    """"-" if only the first has it, "+" if only the second has it, "~" if it differs."""
    before: str
    """Its statement in the first program, or empty."""
    after: str
    """Its statement in the second program, or empty."""
    what: str
    """What differs, or where it comes from."""

    def __str__(self) -> str:
        return f"{self.kind} {self.after or self.before}  # {self.what}"


@dataclass(frozen=True)
class Comparison:
    """How two programs differ."""

    look_ups: tuple[int, int]
    """Of one run of each."""
    widest: tuple[int, int]
    """Input bits of the widest look-up of each."""
    nodes: tuple[int, int]
    """How many each has."""
    changes: tuple[Change, ...]
    """In order."""

    def __str__(self) -> str:
        def pair(values: tuple[int, int]) -> str:
            return f"{values[0]:,}" if values[0] == values[1] else f"{values[0]:,} -> {values[1]:,}"

        head = (
            f"{pair(self.nodes)} nodes, {pair(self.look_ups)} look-ups of at most "
            f"{pair(self.widest)} bits; {len(self.changes)} difference(s)"
        )
        return "\n".join([head, *map(str, self.changes)])


def compare_snapshots(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Compare two programs node by node.

    Nodes are matched in order by operator, shape, module and source line, whatever their names.

    Args:
        before: of `ir.snapshot.snapshot`.
        after: the other one.
    """
    ours, theirs = before["nodes"], after["nodes"]
    matcher = difflib.SequenceMatcher(
        None, [_key(n) for n in ours], [_key(n) for n in theirs], autojunk=False
    )
    changes: list[Change] = []
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal":
            pairs = zip(ours[a0:a1], theirs[b0:b1], strict=True)
            changes += [c for a, b in pairs if (c := _changed(a, b)) is not None]
            continue
        changes += [Change("-", n["statement"], "", _origin(n)) for n in ours[a0:a1]]
        changes += [Change("+", "", n["statement"], _origin(n)) for n in theirs[b0:b1]]
    return Comparison(
        look_ups=(_look_ups(ours), _look_ups(theirs)),
        widest=(_widest(ours), _widest(theirs)),
        nodes=(len(ours), len(theirs)),
        changes=tuple(changes),
    )


def _look_ups(nodes: Sequence[Mapping[str, Any]]) -> int:
    return sum(n["look_ups"] for n in nodes)


def _widest(nodes: Sequence[Mapping[str, Any]]) -> int:
    return max((n.get("reads_bits", 0) for n in nodes), default=0)


def _key(n: Mapping[str, Any]) -> tuple[Any, ...]:
    return n["operator"], tuple(n["shape"]), n["module_path"], n["source"]


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> Change | None:
    different = [k for k in _COMPARED if a.get(k) != b.get(k)]
    if not different:
        return None
    said = [
        k if k == "table" else f"{k.replace('_', ' ')} {a.get(k)} -> {b.get(k)}" for k in different
    ]
    return Change("~", a["statement"], b["statement"], ", ".join(said))


def _origin(n: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (n["type"], n["module_path"], n["source"], n["made_by"])))

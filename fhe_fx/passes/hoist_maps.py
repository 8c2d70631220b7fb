"""Apply a function before its input is moved or repeated, not after.

Exact. A table read once for an element, instead of once for each copy of it; and functions that a
reshape kept apart become neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import PUT_PAIRS, TAKE_PAIRS
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["HoistMaps"]

_MOVES = d.STRUCTURAL - {d.CAT, PUT_PAIRS, TAKE_PAIRS}


@register
@dataclass(frozen=True)
class HoistMaps(Pass):
    """Commute a map with the structural operator before it, unless that drops elements."""

    name: ClassVar[str] = "hoist-maps"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Rewrite until nothing moves."""
        changed = False
        waiting = program.maps()
        while waiting:
            node = waiting.pop(0)
            move = d.input_node(node)
            if not d.is_call(move, *_MOVES):
                continue
            source = d.input_node(move)
            if math.prod(d.shape_of(source)) > math.prod(d.shape_of(move)):
                program.note(self, node, f"{move.name} drops elements that would be looked up")
                continue
            if any(c.numel() > 1 for c in d.map_of(node).buffers()):
                program.note(self, node, "its function differs from element to element")
                continue
            b = program.before(node, self)
            hint = cast(str, node.target).rstrip("0123456789").rstrip("_")
            mapped = b.map(source, d.map_of(node), hint)
            args = [mapped if a is source else a for a in move.args]
            program.replace(node, b.call(move.target, *args))
            waiting.append(mapped)
            changed = True
        return changed

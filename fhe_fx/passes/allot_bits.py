"""Give every look-up its input width.

Exact in float: the widths only take effect when integers are made. Each look-up reads
`options.lookup_bits`, unless its node carries a width already (`node.meta["lookup_bits"]`), so a
pass placed before this one can spend bits where they matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["AllotBits"]


@register
@dataclass(frozen=True)
class AllotBits(Pass):
    """Set `node.meta["lookup_bits"]` on every map."""

    name: ClassVar[str] = "allot-bits"
    requires: ClassVar[frozenset[str]] = frozenset({"fused"})
    gives: ClassVar[frozenset[str]] = frozenset({"bits"})

    def run(self, program: Program) -> bool:
        """Fill in what no earlier pass chose."""
        for node in program.maps():
            node.meta.setdefault("lookup_bits", program.options.lookup_bits)
        return False

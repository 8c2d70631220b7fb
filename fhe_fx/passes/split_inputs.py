"""Give the readers of an input ciphertexts of their own, where one would cost bits or precision.

Exact. An input that goes into a wide accumulator and straight into a result would make the result
as wide as the accumulator, which costs bits of every look-up; one that is weighted and also added
to something would have the scale of that sum. Readers that only weight it, and end in look-ups,
share one: behind an approximate rounding width is free, and a fresh ciphertext is not (encrypting
50 and expanding them from their seeds takes as long as a look-up, on one core).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.classes import encodings

__all__ = ["SplitInputs"]


@register
@dataclass(frozen=True)
class SplitInputs(Pass):
    """Copy an input for its readers, then merge the copies that may share an encoding."""

    name: ClassVar[str] = "split-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    gives: ClassVar[frozenset[str]] = frozenset({"inputs-split"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Rewrite every input with several readers."""
        program.sources = {n.name: program.source_of(n) for n in program.placeholders}
        originals = program.placeholders
        for node in originals:
            for user in list(node.users)[1:]:
                user.replace_input_with(node, self._copy(program, node))
        number = encodings(program)
        returned = {number[node] for node in program.results}
        apart = returned | {number[n] for n in program.placeholders if not _is_only_weighted(n)}
        kept: dict[tuple[int, int | None, bool], fx.Node] = {}
        for node in program.placeholders:
            own = number[node] if number[node] in apart else None
            # What goes into a result without weights has its scale, too fine to be weighted at.
            is_weighted = own in returned and _is_only_weighted(node)
            key = (program.sources[node.name], own, is_weighted)
            if key in kept:
                node.replace_all_uses_with(kept[key])
                program.graph.erase_node(node)
                del program.sources[node.name]
            else:
                kept[key] = node
        return len(program.placeholders) > len(originals)

    @staticmethod
    def _copy(program: Program, node: fx.Node) -> fx.Node:
        with program.graph.inserting_before(program.placeholders[-1].next):
            copy = program.graph.placeholder(f"{node.name}_copy")
        copy.target = copy.name  # names are made unique, targets are not: they are arguments
        copy.meta.update(node.meta)
        program.sources[copy.name] = program.sources[node.name]
        return copy


def _is_only_weighted(node: fx.Node) -> bool:
    """Say whether all that reads a node, moved or not, multiplies it by clear weights."""
    return all(
        d.is_call(user, LINEAR) or (d.is_call(user, *d.STRUCTURAL) and _is_only_weighted(user))
        for user in node.users
    )

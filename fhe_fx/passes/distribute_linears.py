"""Multiply what inputs alone make, and what look-ups answered, by clear weights apart.

Exact to float rounding: a product with clear weights distributes over sums. In W (a + V x), where
look-ups answered a, the inner product V x would have to be read through a look-up to become narrow;
W a + (W V) x has the two products made one, which costs nothing, and no noise of a look-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fhe_fx.ir import dialect as d
from fhe_fx.ir.chains import AffineChain
from fhe_fx.ir.ops import LINEAR
from fhe_fx.ir.parts import without_others
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["DistributeLinears"]


@register
@dataclass(frozen=True)
class DistributeLinears(Pass):
    """Split every product of a sum of answers and of products of an input."""

    name: ClassVar[str] = "distribute-linears"
    requires: ClassVar[frozenset[str]] = frozenset({"fused"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Split at the outer product."""
        changed = False
        for node in program.calls(LINEAR):
            chain = AffineChain.of(node)
            inputs = [s for s in chain.sources if s.op == "placeholder"]
            answers = [s for s in chain.sources if s.op != "placeholder"]
            if not inputs or not answers or chain.products_of(inputs) == 1:
                continue
            if len(inputs) > 1:
                program.note(self, node, f"it multiplies {len(inputs)} inputs besides answers")
                continue
            of_input = chain.of_source(inputs[0])
            if (reason := of_input.reason_against_one_product()) is not None:
                program.note(self, node, reason)
                continue
            b = program.before(node, self)
            alone = without_others(b, d.input_node(node), answers)
            assert alone is not None
            product = b.call(LINEAR, alone, node.args[1])
            program.replace(node, b.add(of_input.as_one_product(b), product))
            changed = True
        program.clean()
        return changed

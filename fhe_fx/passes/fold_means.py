"""Let products with clear weights give values less their mean, not the values alone.

Exact to float rounding. A layer norm takes the mean over n channels off a residual stream, as
n x - sum(x), and what it reads has the noise of x times n. Where x is a sum of products W a of
answers, and of inputs, the centre C = n - 1 1^T is one more clear-weight product: n x - sum(x) is
(W C) a, whose noise is that of a product alone, and inputs have none. The stream itself is left as
it is for whatever else reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.chains import AffineChain
from fhe_fx.ir.ops import LINEAR
from fhe_fx.ir.program import Program
from fhe_fx.ir.views import Sum
from fhe_fx.passes.base import Pass, register

__all__ = ["FoldMeans"]


@register
@dataclass(frozen=True)
class FoldMeans(Pass):
    """Rewrite sums of products and inputs of which a sum over channels is taken off."""

    name: ClassVar[str] = "fold-means"
    requires: ClassVar[frozenset[str]] = frozenset({"fused"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Rewrite where a map reads them."""
        changed = False
        for node in dict.fromkeys(d.input_node(m) for m in program.maps()):
            if not d.is_call(node, d.ADD, d.SUB):
                continue
            chain = AffineChain.of(node, to_products=True)
            if not _takes_off_a_mean(chain):
                continue
            parts = [chain.of_source(s) for s in chain.sources]
            reasons = [p.reason_against_rows() for p in parts]
            if (reason := next(filter(None, reasons), None)) is not None:
                program.note(self, node, reason)
                continue
            program.replace(node, _sum_of(program.before(node, self), parts))
            changed = True
        program.clean()
        return changed


def _takes_off_a_mean(chain: AffineChain) -> bool:
    """Say whether sums over channels are read together with their terms, and products make them."""
    sums = [n for n in chain.nodes if d.is_call(n, d.SUM) and _is_over_channels(n)]
    products = [n for n in chain.nodes if d.is_call(n, LINEAR)]
    return bool(sums and products) and all(
        s.op == "placeholder" or any(d.input_node(p) is s for p in products) for s in chain.sources
    )


def _is_over_channels(node: fx.Node) -> bool:
    last = len(d.shape_of(d.input_node(node))) - 1
    return [dim % (last + 1) for dim in Sum.of(node).dims] == [last]


def _sum_of(b: Builder, parts: list[AffineChain]) -> fx.Node:
    """Write each part as a product, and add; the constants are in the first."""
    first, *others = parts
    total = first.as_one_product(b)
    for part in others:
        total = b.add(total, part.as_one_product(b, shifts=False))
    return total

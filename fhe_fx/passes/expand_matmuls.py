"""Write a matrix product of two encrypted tensors as elementwise products and a sum.

Exact to float rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["ExpandMatmuls"]


@register
@dataclass(frozen=True)
class ExpandMatmuls(Pass):
    """[.., M, K] @ [.., K, N] becomes a sum over K of products of shape [.., M, N, K]."""

    name: ClassVar[str] = "expand-matmuls"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    gives: ClassVar[frozenset[str]] = frozenset({"no-matmul"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Rewrite each product."""
        nodes = program.calls(d.MATMUL)
        for node in nodes:
            b = program.before(node, self)
            x, y = d.input_node(node), b.transpose(d.input_node(node, 1), -2, -1)
            *lead, m, k = d.shape_of(x)
            n = d.shape_of(y)[-2]
            left = b.view(x, (*lead, m, 1, k))
            right = b.view(y, (*lead, 1, n, k))
            program.replace(node, b.sum(b.mul(left, right), [-1]))
        return bool(nodes)

"""Make one clear-weight product of several, and of the affine steps behind them.

Exact to float rounding. Weights on top of weights multiply widths and noise, and a long sum is read
through a look-up before it is weighted again; one product with composed weights is free. What lies
between may depend on the position, as a rotary embedding does: then every row has its own weights.
It may mix rows, too, as the mean weights of an attention do: then a product is of several rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.chains import AffineChain
from fhe_fx.ir.ops import LINEAR
from fhe_fx.ir.parts import without_others
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["FuseLinears"]


@register
@dataclass(frozen=True)
class FuseLinears(Pass):
    """Rewrite whatever is affine in one tensor, row by row, and takes more than one product."""

    name: ClassVar[str] = "fuse-linears"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Compose at the last node of each chain."""
        changed = False
        for node in program.calls(LINEAR):
            changed |= self._split(program, node)
        for node in list(program.encrypted()):
            if not _is_last(node):
                continue
            chain = AffineChain.of(node)
            if not _is_worth_it(chain):
                continue
            if (reason := chain.reason_against_one_product()) is not None:
                program.note(self, node, reason)
                continue
            program.replace(node, chain.as_one_product(program.before(node, self)))
            changed = True
        program.clean()
        return changed

    def _split(self, program: Program, node: fx.Node) -> bool:
        """Make one product of what is multiplied by a product and by this one, beside the rest."""
        chain = AffineChain.of(node)
        parts = [chain.of_source(s) for s in chain.sources if chain.products_of([s]) > 1]
        if not parts or chain.reason_against_one_product() is None:
            return False
        if reason := next(filter(None, (p.reason_against_products() for p in parts)), None):
            program.note(self, node, reason)
            return False
        b = program.before(node, self)
        written = [p.as_products(b, shifts=p is parts[0]) for p in parts]
        composed = {p.sources[0] for p in parts}
        rest = without_others(b, node, [s for s in chain.sources if s not in composed])
        program.replace(
            node, functools.reduce(b.add, written if rest is None else [*written, rest])
        )
        return True


def _is_last(node: fx.Node) -> bool:
    """Say whether something that is not affine reads an affine node."""
    return d.is_call(node, *d.AFFINE) and any(not d.is_call(u, *d.AFFINE) for u in node.users)


def _is_worth_it(chain: AffineChain) -> bool:
    """Say whether there is more than one product and what moves, scales or shifts its elements."""
    n_products = sum(d.is_call(n, LINEAR) for n in chain.nodes)
    return n_products > 1 or (
        n_products == 1 and any(d.is_call(n, d.ADD, d.SUB) for n in chain.nodes)
    )

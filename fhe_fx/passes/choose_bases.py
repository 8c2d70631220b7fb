"""Contract two encrypted matrices over fewer channels, in a basis made for their values.

Not exact: results change by at most `tolerance` of what rounding to `n_bits` would change them.
Any basis may be chosen, x y = (x A)(B^T y), and weights carry it for nothing. Channels that
hardly contribute are left out: each saves R C + R + C look-ups, of R rows and C columns. The others
are rotated until all vary alike, since one scale serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.ir.chains import AffineChain
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.bases import Bases, find_bases

__all__ = ["ChooseBases"]


@register
@dataclass(frozen=True)
class ChooseBases(Pass):
    """Rewrite each `matmul` of two clear-weight products."""

    name: ClassVar[str] = "choose-bases"
    requires: ClassVar[frozenset[str]] = frozenset({"calibrated", "normal"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})
    is_exact: ClassVar[bool] = False

    tolerance: float = 0.25
    """Error of the results that leaving out channels may make, in parts of 2**-n_bits of their
    size. One is what rounding the results to that many bits would make, about."""

    def run(self, program: Program) -> bool:
        """Rewrite one product after the other."""
        changed = False
        for node in program.calls(d.MATMUL):
            against = [AffineChain.of(o).reason_against_one_product() for o in d.operands(node)]
            if reason := next(filter(None, against), None):
                program.note(self, node, f"no weights carry a basis of an operand: {reason}")
                continue
            self._rewrite(program, node)
            changed = True
        return changed

    def _rewrite(self, program: Program, node: fx.Node) -> None:
        x, y = d.input_node(node), d.input_node(node, 1)
        bases = find_bases(_rows(program.observed[x.name]), _rows(program.observed[y.name].mT))
        rank = self._rank(program, node, bases)
        left, right = (m.float() for m in bases.equalized(rank, program.options.seed))
        b = program.before(node, self)
        columns = b.linear(b.transpose(y, -2, -1), right)
        new = b.matmul(b.linear(x, left), b.transpose(columns, -2, -1))
        program.replace(node, new)

    def _rank(self, program: Program, node: fx.Node, bases: Bases) -> int:
        """Return the least rank that keeps the results within the tolerance, by bisection."""
        allowed = self.tolerance * 2.0**-program.options.n_bits
        exact = [program.observed[n.name] for n in program.results]
        inputs = program.stacked(program.samples)

        def error(rank: int) -> float:
            left, right = bases.kept(rank)
            projector = (left @ right.mT).float()
            with torch.no_grad():
                found = _Projected(program.module, node, projector).run(*inputs)
            return _relative_error(exact, found)

        least, most = 1, d.shape_of(node.args[0])[-1]  # type: ignore[arg-type]
        while least < most:
            middle = (least + most) // 2
            if error(middle) <= allowed:
                most = middle
            else:
                least = middle + 1
        return most


class _Projected(BatchInterpreter):
    """Runs a graph in which one product sees its left operand through a projector."""

    def __init__(self, module: fx.GraphModule, node: fx.Node, projector: Tensor) -> None:
        super().__init__(module)
        self.node, self.projector = node, projector

    def run_node(self, n: fx.Node) -> Any:
        if n is self.node:
            x, y = (self.env[operand] for operand in d.operands(n))
            return x @ self.projector @ y
        return super().run_node(n)


def _rows(values: Tensor) -> Tensor:
    """Turn values `[n_samples, *lead, R, K]` of R rows into `[n_samples * R, *lead, K]`."""
    return values.movedim(-2, 0).flatten(0, 1)


def _relative_error(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the greatest rms error of a result, in parts of its deviation."""
    errors = [
        float((e - f).double().square().mean().sqrt() / e.double().std().clamp_min(1e-12))
        for e, f in zip(exact, found, strict=True)
    ]
    return max(errors)

"""Drop look-ups whose answers cannot change a result.

Exact to float rounding. Softmax does not change when a row of scores is shifted, so the squares of
the queries, one of the three terms of a product read off squares, are looked up for nothing: all
scores of a row hold the same ones. The pass knows no softmax: a map is idle if no result has a
derivative by its answers, and none changes when the answers are moved at random, on the samples
and on random inputs far around them (a random identity test, as of polynomials: Schwartz 1980).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.ir.build import compact
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.sensitivity import sensitivities

__all__ = ["DropIdleMaps"]

_FLOAT = 1e-4
"""Part of the results that float rounding may change."""


@register
@dataclass(frozen=True)
class DropIdleMaps(Pass):
    """Replace an idle map that is only added to other values by its mean."""

    name: ClassVar[str] = "drop-idle-maps"
    requires: ClassVar[frozenset[str]] = frozenset({"calibrated", "no-products"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    n_random: int = 8
    """Random inputs on which a map must be idle too."""
    reach: float = 1.0
    """How far these go beyond the observed ranges, in parts of them."""

    def run(self, program: Program) -> bool:
        """Find the idle maps, then drop them one by one."""
        idle = self._idle(program)
        dropped = [node for node in idle if self._drop(program, node)]
        return bool(dropped)

    def _idle(self, program: Program) -> list[fx.Node]:
        inputs = [*program.samples[:8], *self._random(program)]
        gradients = sensitivities(program, inputs, draws=1)
        spread = {n: float(program.observed[n.name].std()) for n in program.maps()}
        # What an error of the size of a map's own spread would do, in parts of the results.
        flat = [n for n, s in spread.items() if float(gradients[n.name].abs().amax()) * s < _FLOAT]
        # A step has no derivative either, and what it reads is not idle.
        return [n for n in flat if not _changes(program, n, spread[n], inputs)]

    def _random(self, program: Program) -> list[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(program.options.seed)
        inputs = [torch.stack(values) for values in zip(*program.samples, strict=True)]
        ends = []
        for values in inputs:
            low, high = values.min(), values.max()
            ends.append((low - self.reach * (high - low), (1 + 2 * self.reach) * (high - low)))
        return [
            tuple(
                low + span * torch.rand(x.shape[1:], generator=generator)
                for x, (low, span) in zip(inputs, ends, strict=True)
            )
            for _ in range(self.n_random)
        ]

    def _drop(self, program: Program, node: fx.Node) -> bool:
        """Replace what reads `node` by shifts, if all of it adds or subtracts."""
        readers = _readers(node)
        users = [user for user, _ in readers]
        if len(set(users)) < len(users) or not all(d.is_call(u, d.ADD, d.SUB) for u in users):
            program.note(self, node, "its answers change nothing, but more than sums read them")
            return False
        mean = program.observed[node.name].double().mean(0)
        for user, argument in readers:
            constant = d.along_moves(argument, node, mean)
            first, second = d.input_node(user), d.input_node(user, 1)
            b = program.before(user, self, user)
            if argument is second:
                sign = -1 if d.is_call(user, d.SUB) else 1
                program.replace(user, b.shift(first, compact(sign * constant)))
            elif d.is_call(user, d.SUB):
                program.replace(user, b.shift(b.scale(second, -1.0), compact(constant)))
            else:
                program.replace(user, b.shift(second, compact(constant)))
        return True


def _changes(
    program: Program, node: fx.Node, spread: float, inputs: list[tuple[Tensor, ...]]
) -> bool:
    """Say whether a result changes, or is not finite, when the answers of a map are moved."""
    values = program.stacked(inputs)
    with torch.no_grad():
        before = BatchInterpreter(program.module).run(*values)
        after = _Moved(program.module, node, spread).run(*values)
    pairs = zip(before, after, strict=True)
    # Sample by sample: results far outside must not hide what changes on ordinary ones.
    return not all(
        bool(((a - b).abs().flatten(1).amax(1) <= _FLOAT * a.abs().flatten(1).amax(1)).all())
        for a, b in pairs
    )


class _Moved(BatchInterpreter):
    """Runs a program, moving the answers of one map at random."""

    def __init__(self, module: fx.GraphModule, node: fx.Node, spread: float) -> None:
        super().__init__(module)
        self.node, self.spread = node, spread
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n is self.node:
            value = value + self.spread * torch.randn(value.shape, generator=self.generator)
        return value


def _readers(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """List who reads the elements of `node`, moved or not, and as which argument."""
    found = []
    for user in node.users:
        if d.is_call(user, *d.STRUCTURAL - {d.CAT}):
            found += _readers(user)
        else:
            found.append((user, node))
    return found

"""Runs a program on a batch, with the noise of bootstraps if wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.ir.ops import LOOKUP, ROUND
from fhe_fx.ir.program import Program
from fhe_fx.ir.views import Lookup, Round
from fhe_fx.quant.lookup_noise import LookupNoise

__all__ = ["Observer", "run_batch"]

Observer = Callable[[fx.Node, Tensor], None]
"""Is told each look-up and what it reads, `[n_samples, *shape]`, before noise."""

_ELEMENTS = 1 << 22
"""Elements of the largest tensor that is computed at once; more samples are run in parts."""


def run_batch(
    program: Program,
    inputs: Sequence[Tensor],
    *,
    noise: LookupNoise | None = None,
    observe: Observer | None = None,
    record: Observer | None = None,
) -> list[Tensor]:
    """Run a program of either stage on a batch.

    Args:
        program: what to run.
        inputs: one tensor for each placeholder, `[n_samples, *shape]`.
        noise: added to what each look-up reads.
        observe: called for each look-up.
        record: called for each encrypted node, with its value; for each part of a large batch.

    Returns:
        One tensor for each result, `[n_samples, *shape]`.
    """
    with torch.no_grad():
        parts = [
            _Noisy(program.module, noise, observe, record).run(*part)
            for part in _parts(program, list(inputs))
        ]
    return [torch.cat(results) for results in zip(*parts, strict=True)]


def _parts(program: Program, inputs: list[Tensor]) -> Iterator[list[Tensor]]:
    largest = max((n.meta["val"].numel() for n in program.encrypted()), default=1)
    size = max(1, _ELEMENTS // max(1, largest))
    for start in range(0, inputs[0].shape[0], size):
        yield [x[start : start + size] for x in inputs]


class _Noisy(BatchInterpreter):
    """Tells the observer of each look-up, and disturbs what it reads."""

    def __init__(
        self,
        module: fx.GraphModule,
        noise: LookupNoise | None,
        observe: Observer | None,
        record: Observer | None,
    ) -> None:
        super().__init__(module)
        self._noise, self._observe, self._record = noise, observe, record

    def run_node(self, n: fx.Node) -> Any:
        value = self._computed(n)
        if self._record is not None and d.is_encrypted(n):
            self._record(n, value)
        return value

    def _computed(self, n: fx.Node) -> Any:
        if d.is_call(n, ROUND) and self._noise is not None and self._noise.reaches_results:
            result = Round.of(n)
            x = self._noise.displace(self.env[result.x], result.lsbs)
            return ROUND(x, result.bits, result.lsbs)
        if not d.is_call(n, LOOKUP):
            return super().run_node(n)
        view = Lookup.of(n)
        x = self.env[view.x]
        if self._observe is not None:
            self._observe(n, x)
        if self._noise is not None:
            x = self._noise.disturb(x, view.bits, view.lsbs)
        return LOOKUP(x, view.tables, view.which, view.bits, view.lsbs)

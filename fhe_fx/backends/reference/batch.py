"""Runs a program on many samples at once: every encrypted value carries a leading axis of them.

Shapes are written into a program (`reshape`, `expand`, ...), so the graph itself takes one sample.
Here each operator is applied with its dimensions moved by one. The meaning is the graph's: integers
are equal bit for bit, and floats up to the order in which a matrix product adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from fhe_fx.backends.reference.noise import LookupNoise
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR, LOOKUP
from fhe_fx.ir.program import Program

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
) -> list[Tensor]:
    """Run a program of either stage on a batch.

    Args:
        program: without pairs, products and softmax, that is, any integer program, or a float
            program from `assign-scales` on.
        inputs: one tensor for each placeholder, `[n_samples, *shape]`.
        noise: added to what each look-up reads.
        observe: called for each look-up.

    Returns:
        One tensor for each result, `[n_samples, *shape]`.
    """
    parts = [
        _Batch(program.module, noise, observe).run(*part) for part in _parts(program, list(inputs))
    ]
    return [torch.cat(results) for results in zip(*parts, strict=True)]


def _parts(program: Program, inputs: list[Tensor]) -> Iterator[list[Tensor]]:
    largest = max((n.meta["val"].numel() for n in program.encrypted()), default=1)
    size = max(1, _ELEMENTS // max(1, largest))
    for start in range(0, inputs[0].shape[0], size):
        yield [x[start : start + size] for x in inputs]


class _Batch(fx.Interpreter):
    """Evaluates a graph whose encrypted values have one leading axis more than it says."""

    def __init__(
        self, module: fx.GraphModule, noise: LookupNoise | None, observe: Observer | None
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._noise, self._observe = noise, observe

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args = fx.node.map_arg(n.args, self.env.__getitem__)
        kwargs = fx.node.map_arg(n.kwargs, self.env.__getitem__)
        return self._call(n, list(args), kwargs)

    def _call(self, n: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        shape = d.shape_of(n)
        target = cast(Any, n.target)
        if d.is_call(n, d.VIEW):
            return args[0].reshape(-1, *shape)
        if d.is_call(n, d.EXPAND):
            return _ranked(args[0], len(shape)).expand(-1, *shape)
        if d.is_call(n, d.PERMUTE):
            rank = len(shape)
            return args[0].permute(0, *(dim % rank + 1 for dim in args[1]))
        if d.is_call(n, d.SUM):
            rank = len(d.shape_of(d.input_node(n)))
            dims = [dim % rank + 1 for dim in args[1]]
            return target(args[0], dims, *args[2:], **kwargs)
        if d.is_call(n, d.CAT, d.INDEX_SELECT):
            args[1] = (args[1] if len(args) > 1 else 0) % len(shape) + 1
            return target(*args, **kwargs)
        if d.is_call(n, LOOKUP):
            return self._lookup(n, *args)
        if d.is_call(n, LINEAR):
            rank = max(args[1].dim(), len(d.shape_of(d.input_node(n))))
            return target(_ranked(args[0], rank), args[1])
        for node, place in ((m, i) for i, m in enumerate(n.args) if isinstance(m, fx.Node)):
            if d.is_encrypted(node):
                args[place] = _ranked(args[place], len(shape))
        return target(*args, **kwargs)

    def _lookup(
        self, n: fx.Node, x: Tensor, tables: Tensor, which: Tensor, bits: int, lsbs: int
    ) -> Tensor:
        if self._observe is not None:
            self._observe(n, x)
        if self._noise is not None:
            x = self._noise.disturb(x, bits, lsbs)
        return cast(Tensor, LOOKUP(x, tables, which, bits, lsbs))


def _ranked(x: Tensor, rank: int) -> Tensor:
    """Give each sample `rank` dimensions, the new ones in front, as broadcasting does."""
    return x.reshape(x.shape[0], *(1,) * (rank + 1 - x.dim()), *x.shape[1:])

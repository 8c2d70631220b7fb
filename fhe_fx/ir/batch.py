"""Runs a graph on many samples at once: every encrypted value carries a leading axis of them.

Shapes are written into a program (`reshape`, `expand`, ...), so the graph itself takes one sample.
Here each operator is applied with its dimensions moved by one. The meaning is the graph's: integers
are equal bit for bit, and floats up to the order in which a matrix product adds.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR, MASKED_SOFTMAX, PUT_PAIRS, TAKE_PAIRS

__all__ = ["BatchInterpreter"]


class BatchInterpreter(fx.Interpreter):
    """Evaluates a graph of either stage; placeholders are given as `[n_samples, *shape]`."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Apply an operator of the dialect to a batch."""
        if n.op != "call_function":
            return super().run_node(n)
        args = fx.node.map_arg(n.args, self.env.__getitem__)
        return self._call(n, list(args))

    def _call(self, n: fx.Node, args: list[Any]) -> Any:
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
            return target(args[0], [dim % rank + 1 for dim in args[1]], *args[2:])
        if d.is_call(n, d.CAT, d.INDEX_SELECT):
            args[1] = args[1] % len(shape) + 1
            return target(*args)
        if d.is_call(n, TAKE_PAIRS, PUT_PAIRS, MASKED_SOFTMAX):
            return target(*args)
        rank = len(shape)
        if d.is_call(n, LINEAR):
            rank = max(args[1].dim(), len(d.shape_of(d.input_node(n))))
        for place, node in enumerate(n.args):
            if isinstance(node, fx.Node) and d.is_encrypted(node):
                args[place] = _ranked(args[place], rank)
        return target(*args)


def _ranked(x: Tensor, rank: int) -> Tensor:
    """Give each sample `rank` dimensions, the new ones in front, as broadcasting does."""
    return x.reshape(x.shape[0], *(1,) * (rank + 1 - x.dim()), *x.shape[1:])

"""How far apart two correct runs of a float graph may be that add in another order.

The graph is run in double precision, once as it is and some times with an error of single precision
behind every operator. Errors are taken for independent and normal, with the deviation that a sum
of n products has in the worst order, sqrt(n/3) u |a||b| (Higham and Mary 2019, "A new approach to
probabilistic rounding error analysis": at most n partial sums, none beyond |a||b|, each rounded by
u/sqrt(3) of itself). What they do to the results, the graph shows. Worst cases, n u |a||b|, grow by
the norm of every weight, and would allow any answer behind some layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["Rounded", "rounded_results"]

_UNIT = 2.0**-24
"""Half the distance from one to the next number of single precision."""
_OWN_ERROR = 4 * _UNIT
"""What an operator that does not add errs by, in parts of its result: elementary functions are
right to a few units in the last place."""
_DRAWS = 8
_FACTOR = 2 * math.sqrt(2)
"""Two runs differ by an error of each, with the square root of two of one's deviation; twice the
largest of all that was drawn is then not passed by chance."""
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "dot", "convolution"}
_SUMS = {"sum", "mean"}
_EXACT = {
    *("amax", "amin", "as_strided", "broadcast_in_dim", "cat", "clone", "collapse_view"),
    *("convert_element_type", "full_like", "gather", "getitem", "index", "neg", "rev", "select"),
    "slice",
    *("split_dim", "squeeze", "transpose", "view_of", "where", "abs", "round", "clamp", "_to_copy"),
}
"""Operators that round nothing, of those that are left where all others are written out."""
_aten = torch.ops.aten
_KEPT = {_aten.round.default, _aten.clamp.default, _aten._to_copy.default}
"""Operators that an encoder has, and that are not written out: they are looked for."""


@dataclass(frozen=True)
class Rounded:
    """A result of a graph, and how far from each other single precision may lead."""

    exact: Tensor
    """In double precision; where the graph rounds it to whole numbers at last, before that."""
    bound: float
    """Largest difference of two runs, 0 where nothing is rounded."""


def rounded_results(module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Rounded]:
    """Run a graph in double precision, and estimate what single precision does to its results.

    Args:
        module: a graph of floating-point operators; returns a tuple of tensors.
        inputs: its inputs.
    """
    with torch.no_grad():
        table: dict[Any, Any] = {op: f for op, f in decomposition_table.items() if op not in _KEPT}
        traced = make_fx(module, decomposition_table=table)(*inputs)
        runs = _Runs(traced)
        runs.run(*inputs)
    return [
        Rounded(exact, _FACTOR * max(_distance(x, exact) for x in drawn))
        for exact, *drawn in (runs.kept[n] for n in runs.results)
    ]


class _Runs(fx.Interpreter):
    """Evaluates a graph several times side by side: first exactly, then with errors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.generator = torch.Generator().manual_seed(0)
        output = next(iter(reversed(module.graph.nodes)))
        self.results = [_before_rounding(n) for n in output.args[0]]
        self.kept: dict[fx.Node, list[Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        if n.op == "call_function":
            values = self._call(n)
        else:
            values = [_double(super().run_node(n))] * (_DRAWS + 1)
        if n in self.results:
            self.kept[n] = values
        return values

    def _call(self, n: fx.Node) -> list[Any]:
        def arguments(run: int) -> Any:
            given = fx.node.map_arg((n.args, n.kwargs), lambda m: self.env[m][run])
            return pytree.tree_map(lambda v: torch.float64 if v is torch.float32 else v, given)

        def call(given: Any) -> Any:
            return _double(n.target(*given[0], **given[1]))  # type: ignore[operator]

        exact, *others = (call(arguments(run)) for run in range(_DRAWS + 1))
        if _name(n) in _EXACT:
            return [exact, *others]
        deviation = _deviation(_name(n), exact, arguments(0), call)
        return [exact, *(pytree.tree_map(self._erring, other, deviation) for other in others)]

    def _erring(self, value: Any, deviation: Any) -> Any:
        if not _is_real(value):
            return value
        error = torch.randn(value.shape, generator=self.generator, dtype=value.dtype)
        return torch.where(deviation.isfinite(), value + error * deviation, value)


def _name(n: fx.Node) -> str:
    return str(getattr(n.target, "__name__", "")).partition(".")[0]


def _deviation(name: str, exact: Any, given: Any, call: Any) -> Any:
    """Return the deviation of an operator's error, of the structure of its results."""
    args, _ = given
    if name in _PRODUCTS | _SUMS:
        return _of_sum(_n_terms(name, args, exact), call(pytree.tree_map(_size, given)))
    if name == "var":  # some subtract the square of the mean from the mean of the squares
        return _of_sum(args[0].numel() / max(1, exact.numel()), args[0].square().mean(args[1]))
    return pytree.tree_map(lambda v: _OWN_ERROR * _size(v) if _is_real(v) else v, exact)


def _of_sum(n_terms: float, size: Tensor) -> Tensor:
    return math.sqrt(n_terms / 3) * _UNIT * size


def _n_terms(name: str, args: Sequence[Any], exact: Tensor) -> float:
    if name in _SUMS:
        return float(args[0].numel() / max(1, exact.numel()))
    if name == "convolution":
        return float(args[1][0].numel())
    return float(args[1 if name in {"addmm", "baddbmm"} else 0].shape[-1])


def _size(value: Any) -> Any:
    return value.abs() if _is_real(value) else value


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _double(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.double() if _is_real(v) else v, value)


def _before_rounding(result: fx.Node) -> fx.Node:
    """Return the value that a result was before it became whole numbers; else the result."""
    node = result
    while node.target in _KEPT:
        node = node.all_input_nodes[0]
        if node.target is _aten.round.default:
            return node.all_input_nodes[0]
    return result


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two results of one type."""
    if not a.is_floating_point():
        return 0.0
    differs = a != b  # infinities are equal
    return float((a[differs] - b[differs]).abs().max()) if bool(differs.any()) else 0.0

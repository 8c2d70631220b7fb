"""Typed views of nodes: the arguments of an operator by name, constants loaded.

    bits = Lookup.of(node).bits  # not node.args[3]

Operators with one or two tensors and nothing else need no view: `dialect.input_node` names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP, MASKED_SOFTMAX, PUT_PAIRS, ROUND, TAKE_PAIRS

__all__ = [
    "Cat",
    "IndexSelect",
    "Lookup",
    "MaskedSoftmax",
    "Permute",
    "PutPairs",
    "Round",
    "Sum",
    "TakePairs",
]


def _arguments(node: fx.Node, target: Any) -> list[Any]:
    if not d.is_call(node, target):
        raise TypeError(f"{node.name} calls {node.target}, not {target}.")
    return list(node.args)


@dataclass(frozen=True)
class Lookup:
    """A programmable bootstrap; see `ops` for the meaning of each argument."""

    x: fx.Node
    tables: Tensor
    which: Tensor
    bits: int
    lsbs: int

    @staticmethod
    def of(node: fx.Node) -> Lookup:
        """Read the arguments of a `lookup`."""
        x, tables, which, bits, lsbs = _arguments(node, LOOKUP)
        return Lookup(x, d.constant(tables), d.constant(which), bits, lsbs)


@dataclass(frozen=True)
class Round:
    """A result without its low bits; see `ops` for the meaning of each argument."""

    x: fx.Node
    bits: int
    lsbs: int

    @staticmethod
    def of(node: fx.Node) -> Round:
        """Read the arguments of a `round`."""
        return Round(*_arguments(node, ROUND))


@dataclass(frozen=True)
class MaskedSoftmax:
    """Softmax over the last dimension, or its logarithm, among live entries."""

    x: fx.Node
    live: Tensor
    is_log: bool

    @staticmethod
    def of(node: fx.Node) -> MaskedSoftmax:
        """Read the arguments of a `masked_softmax`."""
        x, live, is_log = _arguments(node, MASKED_SOFTMAX)
        return MaskedSoftmax(x, d.constant(live), is_log)


@dataclass(frozen=True)
class TakePairs:
    """Pairs of the last two dimensions, gathered into one."""

    x: fx.Node
    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(node: fx.Node) -> TakePairs:
        """Read the arguments of a `take_pairs`."""
        x, rows, columns = _arguments(node, TAKE_PAIRS)
        return TakePairs(x, d.constant(rows), d.constant(columns))


@dataclass(frozen=True)
class PutPairs:
    """The last dimension, scattered into a matrix of zeros."""

    x: fx.Node
    rows: Tensor
    columns: Tensor
    n_rows: int
    n_columns: int

    @staticmethod
    def of(node: fx.Node) -> PutPairs:
        """Read the arguments of a `put_pairs`."""
        x, rows, columns, n_rows, n_columns = _arguments(node, PUT_PAIRS)
        return PutPairs(x, d.constant(rows), d.constant(columns), n_rows, n_columns)


@dataclass(frozen=True)
class Sum:
    """A sum over dimensions."""

    x: fx.Node
    dims: list[int]
    keepdim: bool

    @staticmethod
    def of(node: fx.Node) -> Sum:
        """Read the arguments of a `sum`."""
        x, dims, keepdim = _arguments(node, d.SUM)
        return Sum(x, list(dims), keepdim)


@dataclass(frozen=True)
class Permute:
    """Dimensions in another order."""

    x: fx.Node
    dims: list[int]

    @staticmethod
    def of(node: fx.Node) -> Permute:
        """Read the arguments of a `permute`."""
        x, dims = _arguments(node, d.PERMUTE)
        return Permute(x, list(dims))


@dataclass(frozen=True)
class IndexSelect:
    """Entries along one dimension."""

    x: fx.Node
    dim: int
    index: Tensor

    @staticmethod
    def of(node: fx.Node) -> IndexSelect:
        """Read the arguments of an `index_select`."""
        x, dim, index = _arguments(node, d.INDEX_SELECT)
        return IndexSelect(x, dim, d.constant(index))


@dataclass(frozen=True)
class Cat:
    """Tensors side by side."""

    parts: list[fx.Node]
    dim: int

    @staticmethod
    def of(node: fx.Node) -> Cat:
        """Read the arguments of a `cat`."""
        parts, dim = _arguments(node, d.CAT)
        return Cat(list(parts), dim)

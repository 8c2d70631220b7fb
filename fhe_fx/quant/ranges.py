"""The range that a class of elements was seen to take, from as many samples as the graph allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR, SHIFT

if TYPE_CHECKING:
    from fhe_fx.ir.program import Program

__all__ = ["class_ends", "sample_ends", "times_to_fill"]


def class_ends(
    program: Program, node: fx.Node, class_of: Callable[[fx.Node], Tensor], n_classes: int
) -> tuple[Tensor, Tensor]:
    """Return least and greatest value observed in each class of `node` (inf, -inf elsewhere).

    Rows that a look-up does not read are samples of the same channels. So values are read before
    they were moved or dropped, and a product with clear weights is evaluated on all rows of its
    input: the first row of a prompt alone would show the first words of sentences alone.

    Args:
        program: with observed values.
        node: the value that is looked up or returned.
        class_of: class number of every element of a node.
        n_classes: how many classes there are.
    """
    low = torch.full((n_classes,), torch.inf, dtype=torch.float64)
    high = torch.full((n_classes,), -torch.inf, dtype=torch.float64)
    for classes, values in _seen(program, node, class_of):
        low.scatter_reduce_(0, classes, values.flatten(0, 1).amin(0).double(), "amin")
        high.scatter_reduce_(0, classes, values.flatten(0, 1).amax(0).double(), "amax")
    absent = torch.ones(n_classes, dtype=torch.bool)
    absent[class_of(node).reshape(-1)] = False
    return low.masked_fill(absent, torch.inf), high.masked_fill(absent, -torch.inf)


def sample_ends(
    program: Program, node: fx.Node, class_of: Callable[[fx.Node], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `class_ends` does for each sample apart, and only for the classes of `node`.

    Returns:
        Least and greatest value, `[n_samples, n]` each, float64, and for every element of `node`
        which of the n columns is that of its class.
    """
    own, column = torch.unique(class_of(node), return_inverse=True)
    n_samples = len(program.observed[d.before_moves(node).name])
    low = torch.full((n_samples, len(own)), torch.inf, dtype=torch.float64)
    high = torch.full((n_samples, len(own)), -torch.inf, dtype=torch.float64)
    for classes, values in _seen(program, node, class_of) if len(own) else ():
        place = torch.searchsorted(own, classes).clamp_max(len(own) - 1)
        is_own = own[place] == classes
        index = place[is_own].expand(n_samples, -1)
        low.scatter_reduce_(1, index, values.amin(1)[:, is_own].double(), "amin")
        high.scatter_reduce_(1, index, values.amax(1)[:, is_own].double(), "amax")
    return low, high, column


def _seen(
    program: Program, node: fx.Node, class_of: Callable[[fx.Node], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over observed values that count for the classes of `node`.

    Yields:
        Classes `[n]`, and values `[n_samples, n_rows, n]`.
    """
    wide = d.before_moves(node)
    classes = class_of(wide).reshape(-1)
    yield classes, program.observed[wide.name].reshape(-1, 1, len(classes))
    rows = _all_rows(program, wide)
    if rows is not None:
        made_by, values = rows
        yield class_of(made_by).reshape(-1, values.shape[-1])[0], values


def _all_rows(program: Program, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """Return the clear-weight product behind `node`, and its values on all rows there are.

    Values are `[n_samples, n_rows, n_out]`.
    """
    offset = torch.zeros(())
    made_by = d.before_moves(node)
    if d.is_call(made_by, SHIFT):
        offset = d.constant(d.input_node(made_by, 1))
        made_by = d.input_node(made_by)
    if not d.is_call(made_by, LINEAR) or offset.numel() not in {1, offset.shape[-1:].numel()}:
        return None
    weight = d.constant(d.input_node(made_by, 1))
    source = d.before_moves(d.input_node(made_by))
    if weight.dim() != 2 or not _keeps_channels(d.input_node(made_by), source):
        return None
    observed = program.observed[source.name]
    observed = observed.reshape(len(observed), -1, weight.shape[0])
    return made_by, observed @ weight + offset.reshape(-1)


def _keeps_channels(node: fx.Node, source: fx.Node) -> bool:
    """Say whether the moves from `source` to `node` leave the last dimension as it is."""
    width = d.shape_of(source)[-1] if d.shape_of(source) else 0
    if not width or d.shape_of(node)[-1:] != (width,):
        return False
    numbers = torch.arange(width).expand(d.shape_of(source))
    numbers = d.along_moves(node, source, numbers)
    return torch.equal(numbers, torch.arange(width).expand(numbers.shape))


def times_to_fill(source: fx.Node) -> Tensor:
    """Return by how much a look-up multiplies each element of what it reads, a whole number.

    The range that `choose-ranges` chose for the element then fills the encoding of `source`, which
    has the scale and the width of `assign-scales`.
    """
    low, high = source.meta["range"]
    room = (1 << int(source.meta["width"])) * source.meta["scale"].abs()
    times: Tensor = (room / (high - low).clamp_min(1e-300)).floor().clamp(1, 1 << 16)
    return times

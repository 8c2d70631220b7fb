"""Builds the tables of a look-up from the function that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tables", "build_tables"]

_POINTS = 8
"""Points at which a function is averaged over one slot."""


@dataclass(frozen=True)
class Tables:
    """The tables of one look-up, and what their integers mean."""

    entries: Tensor
    """Distinct tables, int64, `[n_tables, 2**bits]`."""
    which: Tensor
    """Row that each element reads, int64, of the input's shape."""
    offset: Tensor
    """Real value of integer zero at the output, float64, of the input's shape."""


def build_tables(
    function: Callable[[Tensor], Tensor], centre: Tensor, slot: Tensor, scale: Tensor, bits: int
) -> Tables:
    """Tabulate `function` for every element.

    Entry r of an element answers the inputs within half a slot of `centre + slot * r`, for r from
    -2**(bits-1); it is the mean of the function over them, which is the best single answer. The
    constant (first + last) / 2 is subtracted, so that the table continues anti-periodically: a
    value that wraps past the end reads about what it would have read at the end.

    Args:
        function: maps a tensor of the input's shape, element by element.
        centre: real input at entry 0, float64, of the input's shape.
        slot: real width of a slot, likewise.
        scale: real value of one unit of the output, likewise.
        bits: input bits of the look-up.
    """
    half = 1 << (bits - 1)
    inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS - 0.5
    columns = []
    with torch.no_grad():
        for r in range(-half, half):
            total = torch.zeros_like(centre)
            for t in inside:
                total += function(centre + slot * (r + t)).double()
            columns.append(total / _POINTS)
    values = torch.stack(columns, -1)
    constant = (values[..., :1] + values[..., -1:]) / 2
    entries = ((values - constant) / scale.unsqueeze(-1)).round().long()
    distinct, which = torch.unique(entries.reshape(-1, 2 * half), dim=0, return_inverse=True)
    return Tables(distinct, which.view(centre.shape), constant.squeeze(-1))

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
    function: Callable[[Tensor], Tensor],
    centre: Tensor,
    slot: Tensor,
    scale: Tensor,
    bits: int,
    bounds: tuple[Tensor, Tensor] | None = None,
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
        bounds: least and greatest real output that the encoding has room for. A table reaches a
            little beyond the calibrated range, where a function may have a pole, or no value (a
            logarithm below zero); there it answers what it does at the nearest point that has one.
    """
    half = 1 << (bits - 1)
    inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS - 0.5
    columns = []
    with torch.no_grad():
        for r in range(-half, half):
            points = torch.stack([function(centre + slot * (r + t)).double() for t in inside])
            columns.append(points.where(points.isfinite(), torch.nan).nanmean(0))
    values = _continued(torch.stack(columns, -1))
    if bounds is not None:
        values = values.clamp(bounds[0].unsqueeze(-1), bounds[1].unsqueeze(-1))
    constant = (values[..., :1] + values[..., -1:]) / 2
    entries = ((values - constant) / scale.unsqueeze(-1)).round().long()
    distinct, which = torch.unique(entries.reshape(-1, 2 * half), dim=0, return_inverse=True)
    return Tables(distinct, which.view(centre.shape), constant.squeeze(-1))


def _continued(values: Tensor) -> Tensor:
    """Replace every missing entry of a table by the nearest one, in slots, that is not missing."""
    missing = values.isnan()
    if not bool(missing.any()):
        return values
    place = torch.arange(values.shape[-1]).expand(values.shape)
    last = place.masked_fill(missing, -1).cummax(-1).values
    following = place.masked_fill(missing, values.shape[-1])
    following = following.flip(-1).cummin(-1).values.flip(-1)
    is_before = (last >= 0) & (
        (place - last <= following - place) | (following == values.shape[-1])
    )
    nearest = torch.where(is_before, last, following).clamp_max(values.shape[-1] - 1)
    return values.gather(-1, nearest).nan_to_num(0.0)

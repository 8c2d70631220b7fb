"""Builds the tables of a look-up from the function that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhe_fx.ir.ops import TABULATED

__all__ = ["ROOM", "Tables", "build_tables", "distinct_rows", "slot_mean"]

ROOM = 0.05
"""How far a table may answer beyond the calibrated range of its results, as a part of it. Inputs
beyond theirs may lead to a pole; its value would wrap in the accumulator that reads it."""
_POINTS = 8
"""Points at which a function is averaged over one slot."""
_ELEMENTS = 1 << 18
"""Values of which a function is taken at once, about: no larger than a processor's cache."""


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
    averages: bool = True,
) -> Tables:
    """Tabulate `function` for every element.

    Entry r of an element answers the inputs within half a slot of `centre + slot * r`, for r from
    -2**(bits-1); it is the mean of the function over them, which is the best single answer. The
    constant (first + last) / 2 is subtracted, so that the table continues anti-periodically: a
    value that wraps past the end reads about what it would have read at the end.

    Args:
        function: as `slot_mean` takes it.
        centre: real input at entry 0, float64, of the input's shape.
        slot: real width of a slot, likewise.
        scale: real value of one unit of the output, likewise.
        bits: input bits of the look-up.
        bounds: least and greatest real output that the encoding has room for. A table reaches a
            little beyond the calibrated range, where a function may have a pole, or no value (a
            logarithm below zero); there it answers what it does at the nearest point that has one.
        averages: False to answer the function of the middle of a slot.
    """
    half = 1 << (bits - 1)
    averaged = slot if averages else torch.zeros_like(slot)
    together = max(1, _ELEMENTS // (_POINTS * max(1, centre.numel())))
    entries_at_once = torch.arange(-half, half, dtype=torch.float64).split(together)
    columns = [
        slot_mean(function, centre + slot * r.view(-1, *[1] * centre.dim()), averaged)
        for r in entries_at_once
    ]
    values = _continued(torch.cat(columns).movedim(0, -1))
    if bounds is not None:
        values = values.clamp(bounds[0].unsqueeze(-1), bounds[1].unsqueeze(-1))
    constant = (values[..., :1] + values[..., -1:]) / 2
    entries = ((values - constant) / scale.unsqueeze(-1)).round().long()
    distinct, which = distinct_rows(entries.reshape(-1, 2 * half))
    return Tables(distinct, which.view(centre.shape), constant.squeeze(-1))


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of a matrix of int64 in order, and which of them each row is.

    The same as `torch.unique(rows, dim=0, return_inverse=True)`, which compares whole rows while it
    sorts; elements of one class have equal tables, so most of these comparisons are the longest.
    Here rows are told apart by a sum first, and few are sorted.
    """
    generator = torch.Generator().manual_seed(rows.shape[1])
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator)
    sums = (rows * factors).sum(1)  # modulo 2**64
    kinds, kind = torch.unique(sums, return_inverse=True)
    one_of = torch.empty(len(kinds), dtype=torch.int64)
    one_of[kind] = torch.arange(len(rows))
    if not torch.equal(rows[one_of][kind], rows):  # two different rows with one sum
        kind, one_of = torch.arange(len(rows)), torch.arange(len(rows))
    distinct, which = torch.unique(rows[one_of], dim=0, return_inverse=True)
    return distinct, which[kind]


def slot_mean(function: Callable[[Tensor], Tensor], centre: Tensor, slot: Tensor) -> Tensor:
    """Return the mean of `function` over the slot around each centre, nan where it has no value.

    Args:
        function: maps a float32 tensor element by element, whose last dimensions are those of
            `centre`. The graph of a map may hold `tabulated`.
        centre: middle of the slot, float64.
        slot: its width, likewise.
    """
    inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS - 0.5
    points = (centre + inside.view(-1, *[1] * centre.dim()) * slot).float()
    with torch.no_grad():
        if isinstance(function, fx.GraphModule):
            return _mean(_OverSlot(function).run(points))[0]
        return _mean(function(points))[0]


def _mean(points: Tensor) -> Tensor:
    """Return the mean over the first dimension of what is finite, float64, that dimension kept."""
    points = points.double()
    found = points.mean(0, keepdim=True)
    if bool(found.isfinite().all()):  # as nearly always, and then so is every point
        return found
    return points.where(points.isfinite(), torch.nan).nanmean(0, keepdim=True)


class _OverSlot(fx.Interpreter):
    """Runs a function on the points of a slot together, for the means it holds inside."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is TABULATED:
            return _mean(args[0]).to(args[0].dtype).expand(args[0].shape)
        return super().call_function(target, args, kwargs)


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

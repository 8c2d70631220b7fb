"""Round the weights of a sum to whole numbers so that the sum, not each weight, stays right.

What rounding one weight does to the sums is made good by the weights that are rounded after it, as
far as what they multiply varies together on the calibration samples (Frantar et al. 2022, "OPTQ:
Accurate quantization for generative pre-trained transformers", section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["expected_error", "round_weights", "rows_of"]

_BLOCK = 64
"""Weights that are rounded one by one before the others hear of it: memory is read less often."""
_MOST = 1024
"""Weights of one sum that make up for each other, at most: the effort grows with their cube."""
_LEAST_DRAWN = 1e-3
"""Part by which correlations are drawn towards zero at least: the estimate has to be invertible."""


def round_weights(weight: Tensor, deviations: Tensor) -> Tensor:
    """Return whole weights whose sums err little.

    Args:
        weight: `[*batch, n_in, n_out]`, in units of its whole numbers.
        deviations: what is multiplied, less its mean, `[n_values, *batch, n_in]`.

    Returns:
        Whole numbers, int64, of the shape of `weight`.
    """
    n_in = weight.shape[-2]
    if n_in > _MOST:
        parts = zip(_parts(weight, -2), _parts(deviations, -1), strict=True)
        return torch.cat([round_weights(*part) for part in parts], -2)
    order, passed_on = _decomposed(deviations)
    rows = order.unsqueeze(-1).expand_as(weight)
    passed_on = passed_on / passed_on.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    wanted = weight.double().gather(-2, rows)
    error = torch.zeros_like(wanted)
    for start in range(0, n_in, _BLOCK):
        stop = min(start + _BLOCK, n_in)
        for i in range(start, stop):
            error[..., i, :] = wanted[..., i, :] - wanted[..., i, :].round()
            change = passed_on[..., i, i + 1 : stop, None] * error[..., i, None, :]
            wanted[..., i + 1 : stop, :] -= change
        change = passed_on[..., start:stop, stop:].mT @ error[..., start:stop, :]
        wanted[..., stop:, :] -= change
    return torch.zeros_like(wanted).scatter(-2, rows, wanted - error).round().long()


def expected_error(deviations: Tensor) -> Tensor:
    """Return the mean squared error of a sum whose weights `round_weights` rounds, `[*batch]`.

    It does not depend on the weights, as long as their roundings are spread evenly (Frantar et al.
    2022, equation 2).

    Args:
        deviations: what is multiplied, less its mean, `[n_values, *batch, n_in]`.
    """
    if deviations.shape[-1] > _MOST:
        return torch.stack([expected_error(part) for part in _parts(deviations, -1)]).sum(0)
    _, passed_on = _decomposed(deviations)
    return passed_on.diagonal(dim1=-2, dim2=-1).square().reciprocal().sum(-1) / 12


def _parts(values: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Split what one sum multiplies evenly, into as few parts as may be."""
    size = values.shape[dim]
    parts: tuple[Tensor, ...] = values.split(math.ceil(size / math.ceil(size / _MOST)), dim)
    return parts


def _decomposed(deviations: Tensor) -> tuple[Tensor, Tensor]:
    """Return in which order weights are rounded, and what of each error is passed on."""
    spread = _covariance(deviations.double())
    # What varies most is rounded first, while all others can make up for it.
    order = spread.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    spread = spread.gather(-2, order.unsqueeze(-1).expand_as(spread))
    spread = spread.gather(-1, order.unsqueeze(-2).expand_as(spread))
    return order, torch.linalg.cholesky(torch.linalg.inv(spread), upper=True)


def rows_of(values: Tensor, weight: Tensor) -> Tensor:
    """Return the rows that each matrix of `weight` multiplies, `[n_values, *batch, n_in]`."""
    batch = weight.shape[:-2]
    lead = values.shape[1:-2]
    full = torch.broadcast_shapes(lead, batch)
    values = values.view(len(values), *(1,) * (len(full) - len(lead)), *values.shape[1:])
    values = values.expand(len(values), *full, *values.shape[-2:])
    own = [i for i in range(len(batch)) if batch[i] > 1]
    kept = [1 + len(full) - len(batch) + i for i in own]
    rest = [i for i in range(values.dim() - 1) if i not in kept]
    rows = values.permute(*rest, *kept, values.dim() - 1).flatten(0, len(rest) - 1)
    return rows.view(len(rows), *batch, values.shape[-1])


def _covariance(deviations: Tensor) -> Tensor:
    """Estimate the covariance of `[n_values, *batch, n_in]` values, `[*batch, n_in, n_in]`.

    Correlations are drawn towards zero by as much as the number of values leaves them unreliable
    (Chen et al. 2010, "Shrinkage algorithms for MMSE covariance estimation", equation 23).
    """
    n, n_in = deviations.shape[0], deviations.shape[-1]
    size = deviations.square().mean(0).sqrt()
    size = size.clamp_min(1e-6 * float(size.max()) + 1e-30)
    standard = (deviations / size).movedim(0, -2)
    found = standard.mT @ standard / n
    square = found.square().sum((-2, -1))  # its trace is n_in
    drawn = ((1 - 2 / n_in) * square + n_in**2) / ((n + 1 - 2 / n_in) * (square - n_in))
    drawn = drawn.nan_to_num(1.0, 1.0, 1.0).clamp(_LEAST_DRAWN, 1.0)[..., None, None]
    correlation = (1 - drawn) * found + drawn * torch.eye(n_in, dtype=torch.float64)
    return correlation * size.unsqueeze(-1) * size.unsqueeze(-2)

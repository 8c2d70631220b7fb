"""Round the weights of a sum to whole numbers so that the sum, not each weight, stays right.

What rounding one weight does to the sums is made good by the weights that are rounded after it, as
far as what they multiply varies together on the calibration samples (Frantar et al. 2022, "OPTQ:
Accurate quantization for generative pre-trained transformers", section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_weights"]

_BLOCK = 64
"""Weights that are rounded one by one before the others hear of it: memory is read less often."""
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
    spread = _covariance(deviations.double())
    # What varies most is rounded first, while all others can make up for it.
    order = spread.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    rows = order.unsqueeze(-1).expand_as(weight)
    spread = spread.gather(-2, order.unsqueeze(-1).expand_as(spread))
    spread = spread.gather(-1, order.unsqueeze(-2).expand_as(spread))
    passed_on = torch.linalg.cholesky(torch.linalg.inv(spread), upper=True)
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

"""The error of a product of two quantized tensors, as squares compute it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factor", "ProductError"]


@dataclass(frozen=True)
class Factor:
    """One side of a product, on the samples."""

    exact: Tensor
    """Values in float, `[n_samples, *shape]`."""
    rounded: Tensor
    """Values as computed from rounded ones (`rounded_values`), likewise."""
    classes: Tensor
    """Scale class of every element, of shape `shape`."""


class ProductError:
    """Expected squared error of products x y, by class of y, when y is limited.

    x and y come with the errors of the roundings before them, which the other factor multiplies.
    The product adds its own: with a = x / dev(x) and b = y / dev(y) it is read off three squares,
    of a + b, a and b (`products-to-squares`), each rounded to slots of its range / 2**bits, an
    error of variance slot**2 / 12 that the slope of the square at its value multiplies.

    Args:
        y: the factor that is limited.
        x: the other factor.
        bits: input bits of a look-up.
    """

    def __init__(self, y: Factor, x: Factor, bits: int) -> None:
        self.y, self.x = y.rounded.flatten(1).double(), x.rounded.flatten(1).double()
        self.product = (y.exact.double() * x.exact.double()).flatten(1)
        self.y_class, self.x_class = y.classes.reshape(-1), x.classes.reshape(-1)
        pairs = torch.stack([self.y_class, self.x_class])
        self.pair = torch.unique(pairs, dim=1, return_inverse=True)[1]
        self.slot = 2.0**-bits
        self.dev_x = self._deviation(self.x, self.x_class)
        self.a = self.x / self.dev_x

    def of(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the mean squared error in each class of y, limited to `[low, high]` there.

        Args:
            low: a limit for each class, float64.
            high: likewise.
        """
        y = torch.minimum(torch.maximum(self.y, low[self.y_class]), high[self.y_class])
        dev_y = self._deviation(y, self.y_class)
        b = y / dev_y
        read = self._read(self.a + b, self.pair) + self._read(b, self.y_class)
        read = (read + self._read(self.a, self.x_class)) * (self.dev_x * dev_y).square()
        error = read + (self.product - self.x * y).square().mean(0)
        total = torch.zeros(len(low), dtype=torch.float64)
        return total.scatter_add(0, self.y_class, error)

    def _read(self, u: Tensor, index: Tensor) -> Tensor:
        """Return the squared error of reading u**2 / 2 around its mean, for each element."""
        low, high = self._reduce(u.amin(0), index, "amin"), self._reduce(u.amax(0), index, "amax")
        slot = (high - low) * self.slot
        slope = (u - self._reduce(u.mean(0), index, "mean")).square().mean(0)
        return slot.square() / 12 * slope

    def _reduce(self, values: Tensor, index: Tensor, how: str) -> Tensor:
        """Reduce over the elements of each class, and give each element what its class has."""
        found = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
        return found.scatter_reduce(0, index, values, how, include_self=False)[index]

    def _deviation(self, values: Tensor, index: Tensor) -> Tensor:
        mean = self._reduce(values.mean(0), index, "mean")
        square = self._reduce((values - mean).square().mean(0), index, "mean")
        floor = self._reduce(values.abs().amax(0), index, "amax") * 1e-3 + 1e-12
        return torch.maximum(square.sqrt(), floor)

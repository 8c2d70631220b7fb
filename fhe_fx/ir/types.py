"""What the integers of a node mean: real = scale * integer + offset, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["ValueType", "as_decrypted"]

Whole = TypeVar("Whole", Tensor, npt.NDArray[np.int64])


def as_decrypted(x: Whole, bits: int) -> Whole:
    """Return whole numbers as a client reads a result of `bits` bits: modulo twice their number.

    A ciphertext has a bit above its message. Results have no use for it but this: a value beyond
    their bits is still right for half as many more on either side.
    """
    return (x + (1 << bits)) % (2 << bits) - (1 << bits)


@dataclass(frozen=True, eq=False)
class ValueType:
    """The type of a quantized tensor, kept under `node.meta["type"]`."""

    scale: Tensor
    """Real value of one unit, float64, broadcastable to the node's shape."""
    offset: Tensor
    """Real value of integer zero, float64, broadcastable to the node's shape."""
    low: int
    """Least integer that the encoding holds."""
    high: int
    """Greatest integer that the encoding holds."""

    @property
    def is_signed(self) -> bool:
        """Whether negative integers occur."""
        return self.low < 0

    @property
    def bits(self) -> int:
        """Width in bits, sign included."""
        if self.is_signed:
            return max((-self.low - 1).bit_length(), self.high.bit_length()) + 1
        return max(1, self.high.bit_length())

    def __str__(self) -> str:
        return f"{'int' if self.is_signed else 'uint'}{self.bits}"

    @staticmethod
    def signed(bits: int, scale: Tensor, offset: Tensor) -> ValueType:
        """Return the type of signed integers of `bits` bits."""
        return ValueType(scale, offset, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)

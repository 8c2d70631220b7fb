"""What decides how many channels a product of two encrypted matrices keeps."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

from torch import Tensor, fx

from fhe_fx.ir import dialect as d

__all__ = ["first", "look_ups_of_matmul", "relative_error"]


def first(numbers: range, holds: Callable[[int], bool]) -> int:
    """Return the first number for which something holds that holds for all that follow it."""
    return numbers[bisect.bisect_left(numbers, True, key=holds)]


def look_ups_of_matmul(node: fx.Node) -> int:
    """Return the look-ups of a product of two matrices: of pairs, and of both operands' squares."""
    *lead, rows, channels = d.shape_of(node.args[0])  # type: ignore[arg-type]
    columns = d.shape_of(node)[-1]
    return math.prod(lead) * channels * (rows * columns + rows + columns)


def relative_error(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the greatest rms error of a result, in parts of its deviation."""
    errors = [
        float((e - f).double().square().mean().sqrt() / e.double().std().clamp_min(1e-12))
        for e, f in zip(exact, found, strict=True)
    ]
    return max(errors)

"""What decides how many channels a product of two encrypted matrices keeps."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d

if TYPE_CHECKING:
    from fhe_fx.ir.batch import BatchInterpreter
    from fhe_fx.ir.program import Program
    from fhe_fx.quant.bases import Bases

__all__ = ["first", "look_ups_of_matmul", "rank_error"]


def first(numbers: range, holds: Callable[[int], bool]) -> int:
    """Return the first number for which something holds that holds for all that follow it."""
    return numbers[bisect.bisect_left(numbers, True, key=holds)]


def look_ups_of_matmul(node: fx.Node) -> int:
    """Return the look-ups of a product of two matrices: of pairs, and of both operands' squares."""
    *lead, rows, channels = d.shape_of(node.args[0])  # type: ignore[arg-type]
    columns = d.shape_of(node)[-1]
    return math.prod(lead) * channels * (rows * columns + rows + columns)


def rank_error(
    program: Program, bases: Bases, reduced: Callable[[Tensor], BatchInterpreter]
) -> Callable[[int], float]:
    """Return a function from ranks to the error of the results, on the samples.

    Args:
        program: with observed values.
        bases: of which the first directions are kept.
        reduced: runs the program with a projector `[*lead, K, K]` between both bases.

    Returns:
        Of each rank, the greatest rms error of a result in parts of its deviation.
    """
    exact = [program.observed[n.name] for n in program.results]
    inputs = program.stacked(program.samples)

    @functools.cache
    def error(rank: int) -> float:
        left, right = bases.kept(rank)
        with torch.no_grad():
            found = reduced((left @ right.mT).float()).run(*inputs)
        return max(
            float((e - f).double().square().mean().sqrt() / e.double().std().clamp_min(1e-12))
            for e, f in zip(exact, found, strict=True)
        )

    return error

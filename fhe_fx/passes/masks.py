"""Encrypted zeros: behind the mask that one adds, a value is read with other noise.

The noise of a bootstrap comes from switching the key and rounding the mask of what it reads. Values
x, x + z, x + 2z and so on, z an encryption of zero, have masks that are independent in pairs, since
those of x and z are uniform; and so is their noise.
"""

from __future__ import annotations

import torch
from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.integer import Integer
from fhe_fx.ir.types import ValueType

__all__ = ["behind_other_masks", "encrypted_zeros", "stays_inside"]

_DEVIATIONS = 8
"""Of noise, that a value stays away from the ends of a table which it must not pass."""


def stays_inside(x: Integer, width: int, bits: int, deviation: float) -> bool:
    """Say whether a look-up of x never reads beyond the ends of its table.

    Args:
        x: what would be read.
        width: of its encoding.
        bits: input bits of the look-up.
        deviation: of the noise, in slots.
    """
    kind: ValueType = x.node.meta["type"]
    room = (1 << bits - 1) - max(-kind.low, kind.high) / (1 << max(0, width - bits))
    return width >= bits and room >= _DEVIATIONS * deviation


def encrypted_zeros(
    builder: Builder, read: Integer, read_width: int, bits: int, like: Integer, width: int
) -> tuple[Integer, fx.Node]:
    """Encrypt zeros: a look-up that answers a constant, less the constant; return it, too.

    The mask of its answer is as good as random, whatever it reads; but a table of zeros would be
    rotated to an answer without a mask.

    Args:
        builder: writes the nodes.
        read: of which one element is looked up, and stays inside the table (`stays_inside`).
        read_width: of its encoding.
        bits: input bits of the look-up.
        like: has the shape that the zeros are to have, and is what they will be added to.
        width: of its encoding.
    """
    one = read
    for dim in (i for i, size in enumerate(read.scale.shape) if size > 1):
        first = builder.index_select(one.node, dim, torch.tensor([0]))
        one = Integer.typed(
            first, one.scale.narrow(dim, 0, 1), one.offset.narrow(dim, 0, 1), read_width
        )
    constant = 1 << width - 2
    table = torch.full((1, 1 << bits), constant)
    table[0, 0] += 1  # Concrete takes a table of one number for no table
    answer = builder.lookup(one.node, table, torch.tensor(0), bits, read_width - bits)
    answer.meta["function"] = "zero"
    scale = like.scale.reshape(-1)[0]
    nothing = torch.zeros_like(scale)
    Integer.typed(answer, scale, -constant * scale, width)
    zero = Integer.typed(builder.shift(answer, torch.tensor(-constant)), scale, nothing, width)
    shape = d.shape_of(like.node)
    zero = Integer.typed(builder.view(zero.node, (1,) * len(shape)), scale, nothing, width)
    zeros = builder.expand(zero.node, shape)
    return Integer.typed(zeros, like.scale, torch.zeros_like(like.scale), width), answer


def behind_other_masks(builder: Builder, x: Integer, zeros: Integer, n: int) -> list[Integer]:
    """Return x with zeros added once, twice and so on, n times in all.

    Args:
        builder: writes the nodes.
        x: any value.
        zeros: of its shape (`encrypted_zeros`).
        n: how many values are wanted.
    """
    width, found = int(x.node.meta["type"].bits), [x]
    for _ in range(n):
        masked = builder.add(found[-1].node, zeros.node)
        found.append(Integer.typed(masked, x.scale, x.offset, width))
    return found[1:]

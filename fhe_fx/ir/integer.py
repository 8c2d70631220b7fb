"""A node of the integer program together with what its integers mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fhe_fx.ir import dialect as d
from fhe_fx.ir.types import ValueType

if TYPE_CHECKING:
    from torch import Tensor, fx

__all__ = ["Integer"]


@dataclass(frozen=True)
class Integer:
    """A node of the integer program and what its integers mean, element by element."""

    node: fx.Node
    scale: Tensor
    offset: Tensor

    @staticmethod
    def typed(node: fx.Node, scale: Tensor, offset: Tensor, width: int) -> Integer:
        """Attach a signed type of `width` bits to a node."""
        scale, offset = scale.expand(d.shape_of(node)), offset.expand(d.shape_of(node))
        node.meta["type"] = ValueType.signed(width, scale, offset)
        return Integer(node, scale, offset)

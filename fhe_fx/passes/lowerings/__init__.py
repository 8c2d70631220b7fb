"""How each ATen operator is written in the float dialect: one small rule an operator."""

from fhe_fx.passes.lowerings import (  # noqa: F401 -- they register
    arithmetic,
    attention,
    spatial,
    structure,
)
from fhe_fx.passes.lowerings.registry import LOWERINGS, Unsupported, register_lowering

__all__ = ["LOWERINGS", "Unsupported", "register_lowering"]

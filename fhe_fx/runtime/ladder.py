"""One submodule compiled for several lengths: each call takes the shortest circuit that it fits.

A circuit has one length, and a shorter prompt is padded to it, at the price of the whole. A text
that grows pays less on a ladder of lengths. The circuits share one set of keys (`Keyring`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fhe_fx.errors import CaptureError
from fhe_fx.runtime.module import EncryptedModule
from fhe_fx.runtime.signature import keyed_leaves
from fhe_fx.runtime.standin import StandIn

__all__ = ["Ladder"]


class Ladder(StandIn):
    """Runs a submodule through the shortest of several circuits that a call fits."""

    def __init__(self, original: nn.Module, rungs: Sequence[EncryptedModule]) -> None:
        """Put circuits of one submodule together.

        Args:
            original: the submodule.
            rungs: one for each length, from the shortest to the longest.

        Raises:
            CaptureError: if the circuits' first axes differ, which then are not only the batch.
        """
        super().__init__(original)
        self.__dict__["rungs"] = tuple(rungs)  # not children, as the original is not
        for shapes in zip(*(r.region.input_shapes for r in rungs), strict=True):
            if len({shape[0] for shape in shapes}) > 1:
                listed = ", ".join(str(list(shape)) for shape in shapes)
                raise CaptureError(
                    f"{rungs[0].region.name}: an input has shapes {listed} at the lengths that "
                    f"were asked for, so its first axis is not the batch, and no call says which "
                    f"length it has. Give one max_tokens."
                )

    @property
    def parts(self) -> tuple[EncryptedModule, ...]:
        """Its circuits, the shortest first."""
        rungs: tuple[EncryptedModule, ...] = self.__dict__["rungs"]
        return rungs

    @property
    def mode(self) -> str:
        """One of `disable`, `clear`, `simulate`, `execute`, `remote`."""
        return self.parts[0].mode

    @mode.setter
    def mode(self, value: str) -> None:
        before = self.mode
        try:
            for rung in self.parts:
                rung.mode = value
        except Exception:
            for rung in self.parts:
                rung.mode = before
            raise

    def train(self, mode: bool = True) -> Ladder:
        """Put the original in training mode, or back; circuits know no dropout."""
        for rung in self.parts:
            rung.train(mode)
        self.training = mode
        return self

    def extra_repr(self) -> str:
        """Say what stands here when the model is printed."""
        lengths = ", ".join(str(rung.region.tokens) for rung in self.parts)
        own = self.original.extra_repr()
        name = type(self.original).__name__
        return f"{name}{f'({own})' if own else ''}, encrypted at {lengths} tokens, mode={self.mode}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the submodule.

        Raises:
            InputError: if the call fits none of the circuits; the longest says why.
        """
        if self.mode == "disable":
            return self.parts[-1](*args, **kwargs)  # which may have no original to call
        return self.part_for(args, kwargs)(*args, **kwargs)

    def part_for(self, args: Sequence[Any], kwargs: dict[str, Any]) -> EncryptedModule:
        """Return the shortest circuit that a call fits, or the longest if it fits none."""
        leaves = keyed_leaves(args, kwargs)
        return next((rung for rung in self.parts if rung.takes(leaves)), self.parts[-1])

"""What stands in a model where a submodule was: the same parameters, under the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from fhe_fx.errors import TargetError

if TYPE_CHECKING:
    from fhe_fx.runtime.module import EncryptedModule

__all__ = ["StandIn", "encrypted_modules", "put", "stand_ins"]


class StandIn(nn.Module):
    """Takes the place of a submodule, for a model that does not notice.

    Its parameters, buffers and children are the original's, under the original's names, so that a
    `state_dict` fits both models.
    """

    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a child: it would change every name below
        for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[shared] = getattr(original, shared)
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        """Answer what the model asks of the submodule by asking the original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "original" not in self.__dict__:
                raise
            return getattr(self.original, name)

    @property
    def parts(self) -> tuple[EncryptedModule, ...]:
        """The compiled parts that it chooses from, one circuit each."""
        raise NotImplementedError

    def part_for(self, args: Sequence[Any], kwargs: dict[str, Any]) -> EncryptedModule:
        """Return the part that runs a call."""
        raise NotImplementedError

    @property
    def mode(self) -> str:
        """One of `disable`, `clear`, `simulate`, `execute`, `remote`."""
        raise NotImplementedError

    @mode.setter
    def mode(self, value: str) -> None:
        raise NotImplementedError

    def train(self, mode: bool = True) -> StandIn:
        """Put the original in training mode, or back; circuits know no dropout."""
        self.original.train(mode)
        self.training = mode
        return self


def stand_ins(model: nn.Module) -> list[StandIn]:
    """List the stand-ins of a model, in its order.

    That of a module which is encrypted as a whole is what its `forward` calls.
    """
    called = [getattr(m.__dict__.get("forward"), "stand_in", m) for m in model.modules()]
    return list(dict.fromkeys(m for m in called if isinstance(m, StandIn)))


def encrypted_modules(model: nn.Module) -> list[EncryptedModule]:
    """List the encrypted parts of a model, in its order; of each length, the shortest first.

    Raises:
        TargetError: if there is none.
    """
    found = [part for stand_in in stand_ins(model) for part in stand_in.parts]
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no encrypted part. Use the model that "
            f"fhe_fx.encrypt_submodule returned; it leaves the one it is given as it was."
        )
    return found


def put(model: nn.Module, found: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules wherever a model holds those that they are to replace: in one place or more."""
    for parent in list(model.modules()):
        if parent in found.values():
            continue
        for name, child in list(parent._modules.items()):
            if child is not None and child in found:
                parent._modules[name] = found[child]

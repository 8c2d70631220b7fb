"""A model that is encrypted as a whole: held as a submodule while it is lowered, called as itself.

What is encrypted is a submodule with arguments and results. A whole model has both, and no parent;
it gets one for as long as it is captured. What stands in its place afterwards is a model of its
class with the same parameters, whose calls go to the stand-in.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, TypeVar

from torch import nn

from fhe_fx.runtime.standin import StandIn

__all__ = ["Call", "Whole", "called_as"]

M = TypeVar("M", bound=nn.Module)


class Whole(nn.Module):
    """Holds a model as its one submodule, which has the name of the model's class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules[type(model).__name__] = model
        self.name = type(model).__name__

        signature = inspect.signature(model.forward)

        @functools.wraps(model.forward)  # whose parameters say how the model is called
        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _by_name(signature, args, kwargs)
            held = self.get_submodule(self.name)  # a stand-in may have replaced it
            return held(*args, **kwargs)

        self.__dict__["forward"] = forward

    def __getattr__(self, name: str) -> Any:
        """Answer as the model does, of which it is asked for vocabulary and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "name" not in self.__dict__:
                raise
            return getattr(self._modules[self.name], name)


class Call:
    """The `forward` of a model of which all is encrypted."""

    def __init__(self, stand_in: StandIn, model: nn.Module) -> None:
        """Let a stand-in be called with the parameters of a model's own `forward`."""
        self.stand_in = stand_in
        self.__signature__ = inspect.signature(model.forward)
        self.__doc__ = model.forward.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stand-in."""
        args, kwargs = _by_name(self.__signature__, args, kwargs)
        return self.stand_in(*args, **kwargs)


def called_as(model: M, stand_in: StandIn) -> M:
    """Return a model of the same class, with the same parameters, that calls a stand-in.

    Args:
        model: what the stand-in was made of; left as it is.
        stand_in: runs it.
    """
    outside = copy.copy(model)
    outside.__dict__["forward"] = Call(stand_in, model)
    return outside


def _by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, by name those that may be: users write either way."""
    kinds = [p.kind for p in signature.parameters.values()]
    if inspect.Parameter.POSITIONAL_ONLY in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        return args, kwargs
    bound = signature.bind(*args, **kwargs).arguments
    rest = [n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    named = {k: v for k, v in bound.items() if k not in rest}
    return (), {**named, **(bound.get(rest[0], {}) if rest else {})}

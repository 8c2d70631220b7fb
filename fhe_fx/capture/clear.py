"""Which arguments of a call the server may see, by the names of its parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from torch import nn

from fhe_fx.errors import TargetError, did_you_mean

__all__ = ["clear_names", "parameter_of"]


def clear_names(
    model: nn.Module, paths: Sequence[str], given: str | Sequence[str]
) -> frozenset[str]:
    """Check the names of clear arguments.

    Args:
        model: holds the targets.
        paths: dotted paths of the targets.
        given: names of parameters of their forward, or of leaves, such as `args[1]`. Of a part of
            a graph: the input of the graph of which alone an argument is made.

    Raises:
        TargetError: if none of the targets has such a parameter; near names are named.
    """
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise TargetError(f"clear_inputs={given!r} is not a list of names of arguments.")
    known = dict.fromkeys(name for p in paths for name in _parameters(model.get_submodule(p)))
    missing = [n for n in names if n not in known and not re.match(r"(kw)?args\[", n)]
    if missing:
        raise TargetError(
            f"clear_inputs: {', '.join(paths)} has no argument {missing[0]!r}."
            f"{did_you_mean(missing[0], list(known))} Its arguments: {', '.join(known)}."
        )
    return frozenset(names)


def parameter_of(module: nn.Module, leaf: str) -> str:
    """Return the parameter of a module's forward that a leaf of a call belongs to.

    Args:
        module: what is called.
        leaf: such as `args[0]` or `kwargs['mask'][1]`.
    """
    position = re.match(r"args\[(\d+)\]", leaf)
    if position is None:
        keyword = re.match(r"kwargs\['(\w+)'\]", leaf)
        return keyword[1] if keyword else leaf
    names = _parameters(module)
    number = int(position[1])
    return names[number] if number < len(names) else leaf


def _parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's arguments; parts of graphs have them beside their forward."""
    names = getattr(module, "argument_names", None)
    return list(inspect.signature(module.forward).parameters if names is None else names)

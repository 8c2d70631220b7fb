"""Finds the submodules that a user names: a path, a unique suffix, a list, a glob or a regex."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from torch import nn

from fhe_fx.errors import TargetError, did_you_mean

__all__ = ["is_model_itself", "resolve_targets"]


def is_model_itself(target: str | Sequence[str]) -> bool:
    """Say whether a target is all of the model."""
    return target == "" or (not isinstance(target, str) and list(target) == [""])


def resolve_targets(model: nn.Module, target: str | Sequence[str]) -> list[str]:
    """Return the dotted paths of the submodules that `target` names, in the model's order.

    Args:
        model: any module.
        target: `"transformer.h.0.attn"`, a unique suffix of a path (`"h.0.attn"`), a glob
            (`"h.*.attn"`, a suffix too), a regular expression (`"re:.*attn$"`), or a list of these;
            or `""`, the model itself.

    Raises:
        TargetError: if nothing matches (near paths are named), if a suffix is ambiguous (all are
            named), or if one target lies inside another.
    """
    first = {module: name for name, module in model.named_modules()}
    names = {name: first[m] for name, m in model.named_modules(remove_duplicate=False) if name}
    known = list(names)
    wanted = [target] if isinstance(target, str) else target
    if not isinstance(wanted, Sequence) or not all(isinstance(one, str) for one in wanted):
        raise TargetError(
            f"target={target!r} is not a path of a submodule. "
            f"Give a string such as 'h.0.attn', or a list of strings."
        )
    if not wanted:
        raise TargetError("The list of targets is empty. Name at least one submodule.")
    if is_model_itself(target):
        return [""]
    if "" in wanted:
        raise TargetError(
            "'' is the model itself, in which all other targets lie; a part can be encrypted once. "
            "Keep '' or the others."
        )
    found: list[str] = []
    for one in wanted:
        resolved = [names[p] for p in _resolve(type(model).__name__, known, one)]
        found.extend(p for p in dict.fromkeys(resolved) if p not in found)
    found.sort(key=known.index)
    for outer in found:
        if inner := [p for p in found if p.startswith(outer + ".")]:
            raise TargetError(
                f"{inner[0]!r} lies inside {outer!r}; a part can be encrypted once. "
                f"Keep one of the two."
            )
    return found


def _resolve(model_name: str, known: list[str], target: str) -> list[str]:
    if target.startswith("re:"):
        try:
            pattern = re.compile(target[3:])
        except re.error as error:
            raise TargetError(f"{target!r} is not a regular expression: {error}.") from error
        found = [p for p in known if pattern.fullmatch(p)]
    elif any(c in target for c in "*?["):
        found = [
            p
            for p in known
            if p.count(".") >= target.count(".")
            and fnmatch.fnmatchcase(".".join(p.split(".")[-target.count(".") - 1 :]), target)
        ]
    elif target in known:
        return [target]
    else:
        found = [p for p in known if p.endswith("." + target)]
        if len(found) > 1:
            listed = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
            raise TargetError(
                f"{target!r} is ambiguous in {model_name}: {len(found)} submodules end so: "
                f"{listed}. Give a longer suffix, or a glob ('*.{target}') to take all."
            )
    if not found:
        suffixes = sorted(
            {".".join(p.split(".")[i:]) for p in known for i in range(p.count(".") + 1)}
        )
        raise TargetError(
            f"{model_name} has no submodule {target!r}."
            f"{did_you_mean(target, known + [s for s in suffixes if s not in known])}"
        )
    return found

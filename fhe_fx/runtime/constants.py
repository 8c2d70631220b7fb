"""Arguments of a submodule that its circuit holds as constants, and whether a call changes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fhe_fx.errors import InputError
from fhe_fx.runtime.fitting import Fitted
from fhe_fx.runtime.region import Region
from fhe_fx.runtime.signature import Signature

__all__ = ["allowed_effect", "changed_arguments", "effects", "in_float32"]

CHANGED_BEYOND = 1e-3
"""Largest relative difference, in float, at which other arguments still mean the same call."""


def changed_arguments(name: str, signature: Signature, leaves: Mapping[str, Any]) -> list[str]:
    """Return which arguments of a call are not the recorded ones, nor the leading part of them.

    Args:
        name: of the submodule.
        signature: the recorded call.
        leaves: what `keyed_leaves` made of the call.

    Raises:
        InputError: if one is a key/value cache.
    """
    known = signature.others
    changed = sorted(
        n
        for n in {**known, **leaves}
        if n not in signature.encrypted and not _is_same(known.get(n), leaves.get(n))
    )
    caches = [n for n in changed if hasattr(leaves.get(n), "get_seq_length")]
    if caches:
        raise InputError(
            f"{name}: {', '.join(caches)} is a key/value cache, and a circuit has "
            f"no past. Pass use_cache=False."
        )
    return changed


def effects(
    expected: Sequence[Any], region: Region, signature: Signature, fitted: Fitted
) -> list[float]:
    """Return how far each result in float is from that of the circuit's constants.

    Args:
        expected: leaves of what the submodule returns for the call: see `in_float32`.
        region: runs the call with the constants.
        signature: says which leaves are results.
        fitted: the call as the region takes it.

    Returns:
        The largest difference in parts of the largest value, of each result.
    """
    runs = [fitted.cut(region.run_float(s)) for s in fitted.samples]
    return [
        _relative(torch.cat([run[k] for run in runs]), expected[leaf])
        for k, leaf in enumerate(signature.results)
    ]


def allowed_effect(module: nn.Module) -> float:
    """Return the difference that rounding to the type of a module's weights explains."""
    weights = [p.dtype for p in module.parameters() if p.is_floating_point()]
    return max([CHANGED_BEYOND, *(2 * torch.finfo(t).eps for t in weights)])


def in_float32(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Call a module, in single precision so that rounding does not look like a change.

    Returns:
        The leaves of what it returns.
    """

    def widen(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    if any(p.dtype != torch.float32 for p in module.parameters() if p.is_floating_point()):
        module = copy.deepcopy(module).float()
    with torch.no_grad():
        output = module(
            *pytree.tree_map(widen, tuple(args)), **pytree.tree_map(widen, dict(kwargs))
        )
    return pytree.tree_leaves(output)


def _relative(ours: Tensor, theirs: Any) -> float:
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return torch.inf
    return float((ours - theirs.float()).abs().max() / theirs.abs().max().clamp_min(1e-12))


def _is_same(known: Any, given: Any) -> bool:
    """Say whether an argument is the recorded one, or the leading part of it."""
    if not isinstance(known, Tensor) or not isinstance(given, Tensor):
        return type(known) is type(given) and not isinstance(known, Tensor) and bool(known == given)
    if known.dim() != given.dim() or known.is_floating_point() != given.is_floating_point():
        return False
    if not known.is_floating_point() and known.dtype != given.dtype:
        return False
    for axis, size in enumerate(given.shape):
        if axis == 0 and known.shape[0] == 1:
            known = known.expand(size, *known.shape[1:])
        elif size > known.shape[axis]:
            return False
        else:
            known = known.narrow(axis, 0, size)
    return bool(torch.equal(known.to(given), given))

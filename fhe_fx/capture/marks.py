"""Marks on the arguments and results of targets: identity operators that hooks put around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fhe_fx.ir.ops import ENTER, LEAVE

__all__ = ["ClearLeaves", "marked", "no_leaves"]

ClearLeaves = Callable[[str, Any, Any], Collection[int]]
"""Given a target's path and its arguments: numbers of the leaves that are clear."""


def no_leaves(path: str, args: Any, kwargs: Any) -> Collection[int]:
    """Say that no leaf is clear."""
    return ()


@contextlib.contextmanager
def marked(
    model: nn.Module, targets: Sequence[str], clear: ClearLeaves = no_leaves
) -> Iterator[None]:
    """Mark the tensors that enter and leave each target while the model is run or traced.

    Integers that enter are marked, too: they may be numbers of tokens, which the client embeds.
    """

    def is_marked(op: Any, x: Any) -> bool:
        if not isinstance(x, Tensor):
            return False
        return x.is_floating_point() or (op is ENTER and x.dtype in {torch.int64, torch.int32})

    def mark(op: Any, path: str, tree: Any, also: Collection[int] = ()) -> Any:
        leaves, spec = pytree.tree_flatten(tree)
        leaves = [
            op(x, path, i) if is_marked(op, x) or (isinstance(x, Tensor) and i in also) else x
            for i, x in enumerate(leaves)
        ]
        return pytree.tree_unflatten(leaves, spec)

    handles = []
    for path in targets:
        module = model.get_submodule(path)
        handles.append(
            module.register_forward_pre_hook(
                lambda m, a, k, path=path: mark(ENTER, path, (a, k), clear(path, a, k)),
                with_kwargs=True,
            )
        )
        handles.append(
            module.register_forward_hook(
                lambda m, a, k, out, path=path: mark(LEAVE, path, out), with_kwargs=True
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

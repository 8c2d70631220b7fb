"""What a model reads of the results of its targets, found by running it once.

Whoever knows this need not trace what comes behind the targets: the graph may end where the last of
them returns. That is only so where nothing else links a target with what follows, so every
operator is watched, with the memory that it reads; where anything is unclear, the answer is None.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fhe_fx.ir.ops import LEAVE

__all__ = ["Reads", "leaves_read", "until_left"]

Reads = dict[str, list[int]]
"""For each target, numbers of the leaves of its result that are read behind it."""


def leaves_read(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], targets: Sequence[str]
) -> Reads | None:
    """Run a model whose targets are marked, and return which of their results it reads.

    Args:
        model: in eval mode, with the marks of `capture` on its targets.
        args: positional inputs.
        kwargs: keyword inputs.
        targets: dotted paths.

    Returns:
        None if a target is not called exactly once, if none of its results is read, if what it
        computes inside is read outside, or if it writes to memory that is not its own.
    """
    watch = _Watch(targets)
    try:
        with torch.no_grad(), warnings.catch_warnings(), _entered(model, watch), watch:
            warnings.simplefilter("ignore")
            output = model(*args, **kwargs)
    except Exception:  # whatever it is, the caller meets it again and explains it
        return None
    return watch.reads_of(output)


@contextlib.contextmanager
def until_left(model: nn.Module, reads: Reads) -> Iterator[None]:
    """Let a model, while it is traced, return these leaves as soon as all its targets returned."""
    left: dict[str, Any] = {}
    forward, had_own = model.forward, "forward" in vars(model)

    def hook(path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            left[path] = pytree.tree_leaves(output)
            if len(left) == len(reads):
                raise _AllLeftError

        return leave

    def shortened(*args: Any, **kwargs: Any) -> Any:
        left.clear()
        with _unwinding(), contextlib.suppress(_AllLeftError):
            forward(*args, **kwargs)
        return tuple(left[path][number] for path, read in reads.items() for number in read)

    shortened.__wrapped__ = forward  # type: ignore[attr-defined]  # its signature
    handles = [model.get_submodule(p).register_forward_hook(hook(p)) for p in reads]
    model.forward = shortened
    try:
        yield
    finally:
        if had_own:
            model.forward = forward
        else:
            del model.forward
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """Take from the tracer's stack the modules that were left without a return."""
    mode = get_proxy_mode()
    stack = {} if mode is None else mode.tracer.module_stack
    depth = len(stack)
    yield
    while len(stack) > depth:
        stack.popitem()


class _AllLeftError(Exception):
    """Every target has returned."""


@contextlib.contextmanager
def _entered(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Tell a watch when targets are entered and left."""
    handles = []
    for path in watch.calls:
        module = model.get_submodule(path)
        handles += [
            module.register_forward_pre_hook(
                lambda m, a, path=path: watch.enter(path), prepend=True
            ),
            module.register_forward_hook(lambda m, a, out: watch.leave()),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _Watch(TorchDispatchMode):
    """Follows the memory that targets compute: their results, and the rest, which is their own."""

    def __init__(self, targets: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = dict.fromkeys(targets, 0)
        self._results: dict[int, tuple[str, int]] = {}
        self._own: set[int] = set()
        self._kept: list[Tensor] = []  # so that no address is used twice
        self._read: set[tuple[str, int]] = set()
        self._is_inside, self._is_clear_cut = False, True

    def enter(self, path: str) -> None:
        """Note that a target is called."""
        self._is_clear_cut &= not self._is_inside
        self.calls[path] += 1
        self._is_inside = True

    def leave(self) -> None:
        """Note that a target has returned."""
        self._is_inside = False

    def reads_of(self, output: Any) -> Reads | None:
        """Return what was read, with what the model returns; None if that is not all."""
        leaves = pytree.tree_leaves(output)
        self._read_by_others(leaves)
        known = all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)
        reads = {p: sorted(n for path, n in self._read if path == p) for p in self.calls}
        is_once = all(n == 1 for n in self.calls.values())
        return reads if self._is_clear_cut and known and is_once and all(reads.values()) else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = pytree.tree_leaves((args, kwargs))
        if not self._is_inside:
            self._read_by_others(given)
        elif func is LEAVE:
            self._keep(result)
            self._results[_memory(result)] = (args[1], args[2])
        else:
            self._made_inside(func, given, pytree.tree_leaves(result))
        return result

    def _made_inside(self, func: Any, given: Sequence[Any], results: Sequence[Any]) -> None:
        others = {_memory(x) for x in given if isinstance(x, Tensor)} - self._own
        self._read_by_others([x for x in given if isinstance(x, Tensor)], is_inside=True)
        if func._schema.is_mutable and others:
            self._is_clear_cut = False  # it may write to them
        for x in results:
            if isinstance(x, Tensor) and _memory(x) not in others:
                self._keep(x)
                self._own.add(_memory(x))

    def _read_by_others(self, given: Sequence[Any], *, is_inside: bool = False) -> None:
        for x in given:
            if isinstance(x, Tensor):
                if (found := self._results.get(_memory(x))) is not None:
                    self._read.add(found)
                elif not is_inside and _memory(x) in self._own:
                    self._is_clear_cut = False

    def _keep(self, x: Tensor) -> None:
        self._kept.append(x)


def _memory(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)

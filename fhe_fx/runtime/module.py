"""The module that stands in a model where a submodule was, and runs it in the chosen mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fhe_fx.errors import InputError, OptionsError, did_you_mean
from fhe_fx.runtime.region import MODES, Region

__all__ = ["EncryptedModule", "Signature", "keyed_leaves"]

CHANGED_BEYOND = 1e-3
"""Largest relative difference, in float, at which other arguments still mean the same call."""


def keyed_leaves(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Flatten a call; each leaf under a name such as `args[0]` or `kwargs['attention_mask']`."""
    found = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]
    names = ("args", "kwargs")
    return {names[path[0].idx] + pytree.keystr(path[1:]): leaf for path, leaf in found}


@dataclass(frozen=True)
class Signature:
    """How a call of the submodule maps to the region, as recorded on the example."""

    encrypted: tuple[str, ...]
    """Name of the argument that each encrypted input is."""
    others: dict[str, Any]
    """The other arguments of the recorded call; the circuit holds their values as constants."""
    results: tuple[int, ...]
    """Leaf of the output that each result of the region is."""
    output: Any
    """The recorded output, whose structure is returned."""


class EncryptedModule(nn.Module):
    """Runs a submodule in float (`disable`), integers (`clear`), noise (`simulate`) or ciphertext
    (`execute`), inside the model's own forward."""  # noqa: D205, D209

    def __init__(self, original: nn.Module, region: Region, signature: Signature) -> None:
        super().__init__()
        self.original = original
        self.region = region
        self.signature = signature
        self._mode = "disable"

    def __getattr__(self, name: str) -> Any:
        """Answer what the model asks of the submodule by asking the original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    @property
    def mode(self) -> str:
        """One of `disable`, `clear`, `simulate`, `execute`."""
        return self._mode

    @mode.setter
    def mode(self, value: str) -> None:
        if value not in MODES:
            raise OptionsError(
                f"mode={value!r} is not one of {', '.join(MODES)}."
                f"{did_you_mean(value, list(MODES))}"
            )
        self._mode = value

    def extra_repr(self) -> str:
        """Say what stands here when the model is printed."""
        return f"encrypted, mode={self.mode}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the submodule.

        Raises:
            InputError: if the call does not fit what was compiled; names the argument.
        """
        if self._mode == "disable":
            return self.original(*args, **kwargs)
        leaves = keyed_leaves(args, kwargs)
        inputs = [self._input(name, leaves) for name in self.signature.encrypted]
        batch = inputs[0].shape[0]
        lengths = {self._rows(x, shape) for x, shape in self._with_shapes(inputs)}
        rows = lengths.pop() if len(lengths) == 1 else None
        padded = [
            [self._pad(x[i : i + 1], shape) for x, shape in self._with_shapes(inputs)]
            for i in range(batch)
        ]
        axes = self._axes(rows)
        self._check_others(leaves, args, kwargs, padded, rows, axes)
        runs = [self._cut(self.region.run(sample, self._mode), rows, axes) for sample in padded]
        results = [torch.cat([run[k] for run in runs]) for k in range(len(runs[0]))]
        return self._output([r.to(inputs[0].dtype) for r in results])

    # Fitting a call to the circuit ------------------------------------------------------------

    def _with_shapes(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor, tuple[int, ...]]]:
        return list(zip(inputs, self.region.input_shapes, strict=True))

    def _input(self, name: str, leaves: dict[str, Any]) -> Tensor:
        x = leaves.get(name)
        if not isinstance(x, Tensor):
            raise InputError(
                f"{self.region.name}: the circuit encrypts {name}, which this call does not give "
                f"as a tensor. Call the module as it was called when it was compiled."
            )
        shape = self.region.input_shapes[self.signature.encrypted.index(name)]
        wrong = [
            a for a in range(1, len(shape)) if x.dim() == len(shape) and x.shape[a] != shape[a]
        ]
        if x.dim() != len(shape) or len(wrong) > 1 or (wrong and x.shape[wrong[0]] == 0):
            raise InputError(
                f"{self.region.name}: {name} has shape {list(x.shape)}; the circuit takes "
                f"{['batch', *shape[1:]]}."
            )
        if wrong and x.shape[wrong[0]] > shape[wrong[0]]:
            raise InputError(
                f"{self.region.name}: {name} has {x.shape[wrong[0]]} rows; the circuit was "
                f"compiled for at most {shape[wrong[0]]}. "
                f"Encrypt with max_tokens={x.shape[wrong[0]]}."
            )
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{self.region.name}: {name} holds nan or inf.")
        return x

    @staticmethod
    def _rows(x: Tensor, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Return rows given and rows compiled, if they differ."""
        for axis in range(1, len(shape)):
            if x.shape[axis] != shape[axis]:
                return x.shape[axis], shape[axis]
        return None

    @staticmethod
    def _pad(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Repeat the last row up to the compiled length."""
        for axis in range(1, len(shape)):
            if (missing := shape[axis] - x.shape[axis]) > 0:
                last = x.narrow(axis, x.shape[axis] - 1, 1)
                x = torch.cat([x, *[last] * missing], axis)
        return x

    def _axes(self, rows: tuple[int, int] | None) -> dict[int, int]:
        if rows is None:
            return {}
        axes = self.region.causal(rows[1])
        if axes is None:
            raise InputError(
                f"{self.region.name}: {rows[0]} rows were given to a circuit of {rows[1]}, and a "
                f"row of this part may depend on later ones, so it cannot be padded. "
                f"Encrypt with max_tokens={rows[0]}, or give {rows[1]} rows."
            )
        return axes

    @staticmethod
    def _cut(
        results: Sequence[Tensor], rows: tuple[int, int] | None, axes: dict[int, int]
    ) -> list[Tensor]:
        if rows is None:
            return list(results)
        return [r.narrow(axes[k], 0, rows[0]) for k, r in enumerate(results)]

    # Arguments that the circuit holds as constants ---------------------------------------------

    def _check_others(
        self,
        leaves: dict[str, Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        padded: list[list[Tensor]],
        rows: tuple[int, int] | None,
        axes: dict[int, int],
    ) -> None:
        """Refuse a call whose other arguments would give another result."""
        known = self.signature.others
        changed = [
            name
            for name in {**known, **leaves}
            if name not in self.signature.encrypted
            and not _is_same(known.get(name), leaves.get(name))
        ]
        if not changed:
            return
        with torch.no_grad():
            expected = pytree.tree_leaves(self.original(*args, **kwargs))
            runs = [self._cut(self.region.run_float(s), rows, axes) for s in padded]
        for k, leaf in enumerate(self.signature.results):
            ours, theirs = torch.cat([run[k] for run in runs]), expected[leaf].float()
            error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
            if error > CHANGED_BEYOND:
                raise InputError(
                    f"{self.region.name}: {', '.join(sorted(changed))} is not what the circuit was "
                    f"compiled with, and changes the result by {error:.2g} of its range; the "
                    f"circuit holds it as a constant. If it is a padding mask, run each prompt "
                    f"alone and unpadded; if it is a cache, pass use_cache=False."
                )

    def _output(self, results: list[Tensor]) -> Any:
        leaves, spec = pytree.tree_flatten(self.signature.output)
        leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for leaf, result in zip(self.signature.results, results, strict=True):
            leaves[leaf] = result
        return pytree.tree_unflatten(leaves, spec)


def _is_same(known: Any, given: Any) -> bool:
    """Say whether an argument is the recorded one, or the leading part of it."""
    if not isinstance(known, Tensor) or not isinstance(given, Tensor):
        return type(known) is type(given) and not isinstance(known, Tensor) and bool(known == given)
    if known.dim() != given.dim() or known.dtype != given.dtype:
        return False
    for axis, size in enumerate(given.shape):
        if axis == 0 and known.shape[0] == 1:
            known = known.expand(size, *known.shape[1:])
        elif size > known.shape[axis]:
            return False
        else:
            known = known.narrow(axis, 0, size)
    return bool(torch.equal(known, given))

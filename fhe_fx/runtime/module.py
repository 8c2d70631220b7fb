"""The module that stands in a model where a submodule was, and runs it in the chosen mode."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fhe_fx.errors import InputError, OptionsError, did_you_mean
from fhe_fx.runtime.causality import digest_of_clear
from fhe_fx.runtime.region import MODES, Region, as_given
from fhe_fx.runtime.standin import StandIn

__all__ = ["EncryptedModule", "Signature", "keyed_leaves"]

CHANGED_BEYOND = 1e-3
"""Largest relative difference, in float, at which other arguments still mean the same call."""
RELOADED_BEYOND = 0.02
"""Relative change of a weight's norm that a cast to half precision cannot explain."""


def keyed_leaves(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Flatten a call; each leaf under a name such as `args[0]` or `kwargs['attention_mask']`."""
    found: dict[str, Any] = {}
    for name, tree in (("args", tuple(args)), ("kwargs", dict(kwargs))):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            found[name + pytree.keystr(path)] = leaf
    return found


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
    """The recorded output, whose structure is returned; None for tensors that nothing reads."""
    clear: Mapping[str, float] = field(default_factory=dict)
    """Those of `encrypted` that the server may see, and the least value that calibration gave."""


@dataclass(frozen=True)
class _Rows:
    """How the rows of a call lie in those of the circuit; equal where the call fits."""

    given: int
    compiled: int
    axes: tuple[tuple[int, ...], ...]
    """The axis of each encrypted input that holds them; of a clear one any number."""


class EncryptedModule(StandIn):
    """Runs a submodule in float (`disable`), integers (`clear`), noise (`simulate`) or ciphertext
    (`execute`, `remote`), inside the model's own forward.
    """  # noqa: D205

    region: Region
    signature: Signature

    def __init__(self, original: nn.Module, region: Region, signature: Signature) -> None:
        super().__init__(original)
        self.region = region
        self.signature = signature
        self._mode = "disable"
        self._norms = self._weight_norms()

    @property
    def parts(self) -> tuple[EncryptedModule, ...]:
        """Itself: it has one circuit."""
        return (self,)

    def part_for(self, args: Sequence[Any], kwargs: dict[str, Any]) -> EncryptedModule:
        """Return itself."""
        return self

    @property
    def mode(self) -> str:
        """One of `disable`, `clear`, `simulate`, `execute`, `remote`."""
        return self._mode

    @mode.setter
    def mode(self, value: str) -> None:
        if value not in MODES:
            raise OptionsError(
                f"mode={value!r} is not one of {', '.join(MODES)}."
                f"{did_you_mean(str(value), list(MODES))}"
            )
        if value == "remote" and self.region.remote is None:
            raise OptionsError(
                f"{self.region.name} has no server. Connect to one first: "
                f"fhe_fx.connect(url, client=DIR, token=..., model=model)."
            )
        self._mode = value

    def extra_repr(self) -> str:
        """Say what stands here when the model is printed."""
        rows = " and ".join(str(list(shape)) for shape in self.region.input_shapes)
        own = self.original.extra_repr()
        name = type(self.original).__name__
        return f"{name}{f'({own})' if own else ''}, encrypted at {rows}, mode={self.mode}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the submodule.

        Raises:
            InputError: if the call does not fit what was compiled; names the argument.
        """
        if self._mode == "disable":
            return self.original(*args, **kwargs)
        self._check_state()
        leaves = keyed_leaves(args, kwargs)
        inputs = [self._input(name, leaves) for name in self.signature.encrypted]
        samples, rows, result_axes = self._padded(inputs)
        self._check_others(leaves, args, kwargs, samples, rows, result_axes)
        found = self.region.run_many(samples, self._mode)
        runs = [self._cut(results, rows, result_axes) for results in found]
        results = [torch.cat([run[k] for run in runs]) for k in range(len(runs[0]))]
        is_as_recorded = len(samples) == 1 and rows is None
        like = next((x for x in inputs if x.is_floating_point()), None)  # else only token numbers
        results = [r.to(inputs[0].device if like is None else like) for r in results]
        return self._output(results, is_as_recorded)

    # Fitting a call to the circuit ------------------------------------------------------------

    def takes(self, leaves: dict[str, Any]) -> bool:
        """Say whether the inputs of a call are of the circuit's lengths, or may be padded to them.

        Args:
            leaves: what `keyed_leaves` made of the call.
        """
        try:
            self._samples_of(leaves)
        except InputError:
            return False
        return True

    def _fit(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor, tuple[int, ...]]]:
        return list(zip(inputs, self.region.input_shapes, strict=True))

    def _check_state(self) -> None:
        """Refuse a state in which the circuit is not what the module computes."""
        if self.training:
            raise InputError(
                f"{self.region.name} is in training mode; a circuit is one fixed function. "
                f"Call model.eval()."
            )
        for name, norm in self._weight_norms().items():
            known = self._norms.get(name, norm)
            if not abs(norm - known) <= RELOADED_BEYOND * known:
                raise InputError(
                    f"{self.region.name}.{name} has changed since the circuit was made: its norm "
                    f"is {norm:.4g} and was {known:.4g}. Encrypt the float model again."
                )

    def _weight_norms(self) -> dict[str, float]:
        with torch.no_grad():
            return {name: float(p.float().norm()) for name, p in self.named_parameters()}

    def _input(self, name: str, leaves: dict[str, Any]) -> Tensor:
        x = leaves.get(name)
        if not isinstance(x, Tensor):
            raise InputError(
                f"{self.region.name}: the circuit encrypts {name}, which this call does not give "
                f"as a tensor. Call the module as it was called when it was compiled."
            )
        shape = self.region.input_shapes[self.signature.encrypted.index(name)]
        fits = x.dim() == len(shape) and x.numel() > 0 and x.shape[0] % shape[0] == 0
        wrong = [a for a in range(1, len(shape)) if fits and x.shape[a] != shape[a]]
        if not fits or (len(wrong) > 1 and name not in self.signature.clear):
            leading = "batch" if shape[0] == 1 else f"batch * {shape[0]}"
            raise InputError(
                f"{self.region.name}: {name} has shape {list(x.shape)}; the circuit takes "
                f"[{', '.join([leading, *map(str, shape[1:])])}]."
            )
        longer = [a for a in wrong if x.shape[a] > shape[a]]
        if longer:
            axis = longer[0]
            raise InputError(
                f"{self.region.name}: {name} has {x.shape[axis]} rows in axis {axis}; the circuit "
                f"was compiled for at most {shape[axis]}. Give fewer, or encrypt again"
                + (f" with max_tokens={x.shape[axis]}." if axis == 1 else " for the new shape.")
            )
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{self.region.name}: {name} holds nan or inf.")
        return x

    def _n_samples(self, inputs: Sequence[Tensor]) -> int:
        """Return how often the circuit runs: once for each sample of the batch."""
        counts = [x.shape[0] // shape[0] for x, shape in self._fit(inputs)]
        most = max(counts)
        if any(n not in {1, most} for n in counts):
            listed = ", ".join(
                f"{name} has {n}" for name, n in zip(self.signature.encrypted, counts, strict=True)
            )
            raise InputError(f"{self.region.name}: batches of different sizes: {listed}.")
        if most > 1:
            self._check_batch_axis()
        return most

    def _check_batch_axis(self) -> None:
        """Refuse a batch where the results do not hold one sample after the other."""
        leading = {shape[0] for shape in self.region.input_shapes}
        outputs = pytree.tree_leaves(self.signature.output)
        for leaf in self.signature.results:
            if {outputs[leaf].shape[0] if outputs[leaf].dim() else None} != leading:
                raise InputError(
                    f"{self.region.name}: the first axis of a result of shape "
                    f"{list(outputs[leaf].shape)} is not the batch. Run the samples one by one."
                )

    def _rows(self, inputs: Sequence[Tensor]) -> _Rows | None:
        """Return how the call is shorter than the circuit, or None if it is not."""
        axes: list[tuple[int, ...]] = []
        found: set[tuple[int, int] | None] = set()
        for name, (x, shape) in zip(self.signature.encrypted, self._fit(inputs), strict=True):
            shorter = tuple(a for a in range(1, len(shape)) if x.shape[a] != shape[a])
            axes.append(shorter)
            found |= {(x.shape[a], shape[a]) for a in shorter}
            if not shorter and name not in self.signature.clear:
                found.add(None)
        if found <= {None}:
            return None
        if len(found) > 1:
            listed = ", ".join(
                f"{name} has shape {list(x.shape)}"
                for name, x in zip(self.signature.encrypted, inputs, strict=True)
            )
            raise InputError(
                f"{self.region.name}: {listed}; the circuit takes "
                f"{' and '.join(str(list(s)) for s in self.region.input_shapes)}, "
                f"all as long or all equally shorter."
            )
        ((given, compiled),) = (f for f in found if f is not None)
        return _Rows(given, compiled, tuple(axes))

    def samples_of(self, *args: Any, **kwargs: Any) -> list[list[Tensor]]:
        """Return what the region receives in a call: one list of inputs for each sample.

        Raises:
            InputError: if the call does not fit what was compiled.
        """
        return self._samples_of(keyed_leaves(args, kwargs))

    def _samples_of(self, leaves: dict[str, Any]) -> list[list[Tensor]]:
        inputs = [self._input(name, leaves) for name in self.signature.encrypted]
        return self._padded(inputs)[0]

    def asked_of(self, inputs: Sequence[Tensor]) -> tuple[str, dict[int, int]]:
        """Return the digest of a shorter call's clear inputs, and what was proved under them.

        Args:
            inputs: those of the circuit, for one sample, all as much shorter than it.

        Raises:
            InputError: if appended rows could change the results.
        """
        (sample,), rows, axes = self._padded(inputs)
        assert rows is not None, "the call is as long as the circuit"
        return digest_of_clear(*self._question(sample, rows)), axes

    def _padded(
        self, inputs: Sequence[Tensor]
    ) -> tuple[list[list[Tensor]], _Rows | None, dict[int, int]]:
        """Return samples as long as the circuit, and the axis of each result that holds rows.

        Raises:
            InputError: if appended rows could change the results.
        """
        n_samples, rows = self._n_samples(inputs), self._rows(inputs)
        if rows is None or not self.signature.clear:
            axes = self._result_axes(rows)
            return self._samples(inputs, n_samples, rows, is_hidden=False), rows, axes
        for is_hidden in (False, True):
            samples = self._samples(inputs, n_samples, rows, is_hidden=is_hidden)
            found = [self.region.causal_under(*self._question(s, rows)) for s in samples]
            if found[0] is not None and all(axes == found[0] for axes in found):
                return samples, rows, found[0]
        raise self._not_causal(rows)

    def _question(
        self, sample: Sequence[Tensor], rows: _Rows
    ) -> tuple[list[int | None], dict[int, Tensor], int]:
        """Return what `Region.causal_under` is asked of a sample."""
        named = enumerate(zip(self.signature.encrypted, sample, strict=True))
        clear = {k: as_given(x) for k, (name, x) in named if name in self.signature.clear}
        axes = [None if k in clear else a[0] for k, a in enumerate(rows.axes)]
        return axes, clear, rows.given

    def _samples(
        self, inputs: Sequence[Tensor], n_samples: int, rows: _Rows | None, *, is_hidden: bool
    ) -> list[list[Tensor]]:
        hidden = self.signature.clear if is_hidden else {}
        fills = [hidden.get(name) for name in self.signature.encrypted]
        return [
            [
                self._sample(x, shape, i, rows, k, fills[k])
                for k, (x, shape) in enumerate(self._fit(inputs))
            ]
            for i in range(n_samples)
        ]

    @staticmethod
    def _sample(
        x: Tensor,
        shape: tuple[int, ...],
        number: int,
        rows: _Rows | None,
        k: int,
        hidden: float | None,
    ) -> Tensor:
        """Take one sample, and repeat its last row up to the compiled length.

        Args:
            x: an input of all samples.
            shape: of the input that the circuit takes.
            number: the sample.
            rows: how the call lies in the circuit.
            k: number of the input.
            hidden: fills the last axis of a clear input instead: a mask that hides new keys.
        """
        n_samples = x.shape[0] // shape[0]
        x = x.narrow(0, (number % n_samples) * shape[0], shape[0])
        if rows is None:
            return x
        for axis in rows.axes[k]:
            last = x.narrow(axis, rows.given - 1, 1)
            if hidden is not None and axis == rows.axes[k][-1]:
                last = torch.full_like(last, hidden)
            x = torch.cat([x, *[last] * (rows.compiled - rows.given)], axis)
        return x

    def _result_axes(self, rows: _Rows | None) -> dict[int, int]:
        if rows is None:
            return {}
        axes = self.region.causal([a for (a,) in rows.axes])
        if axes is None:
            raise self._not_causal(rows)
        return axes

    def _not_causal(self, rows: _Rows) -> InputError:
        under = " under the clear inputs of this call" if self.signature.clear else ""
        return InputError(
            f"{self.region.name}: {rows.given} rows were given to a circuit of {rows.compiled}, "
            f"and a row of this part may depend on later ones{under}, so it cannot be padded. "
            f"Give {rows.compiled} rows, or encrypt again"
            + (f" with max_tokens={rows.given}." if (1,) in rows.axes else ".")
        )

    @staticmethod
    def _cut(results: Sequence[Tensor], rows: _Rows | None, axes: dict[int, int]) -> list[Tensor]:
        if rows is None:
            return list(results)
        return [r.narrow(axes[k], 0, rows.given) for k, r in enumerate(results)]

    # Arguments that the circuit holds as constants ---------------------------------------------

    def _check_others(
        self,
        leaves: dict[str, Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        samples: list[list[Tensor]],
        rows: _Rows | None,
        result_axes: dict[int, int],
    ) -> None:
        """Refuse a call whose other arguments would give another result."""
        known = self.signature.others
        changed = sorted(
            name
            for name in {**known, **leaves}
            if name not in self.signature.encrypted
            and not _is_same(known.get(name), leaves.get(name))
        )
        if not changed:
            return
        caches = [n for n in changed if hasattr(leaves.get(n), "get_seq_length")]
        if caches:
            raise InputError(
                f"{self.region.name}: {', '.join(caches)} is a key/value cache, and a circuit has "
                f"no past. Pass use_cache=False."
            )
        self._check_effect(changed, args, kwargs, samples, rows, result_axes)

    def _check_effect(
        self,
        changed: Sequence[str],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        samples: list[list[Tensor]],
        rows: _Rows | None,
        result_axes: dict[int, int],
    ) -> None:
        """Refuse arguments that change the result; the float submodule tells."""
        expected = self._in_float32(args, kwargs)
        weights = [p.dtype for p in self.parameters() if p.is_floating_point()]
        allowed = max([CHANGED_BEYOND, *(2 * torch.finfo(t).eps for t in weights)])
        runs = [self._cut(self.region.run_float(s), rows, result_axes) for s in samples]
        for k, leaf in enumerate(self.signature.results):
            ours, theirs = torch.cat([run[k] for run in runs]), expected[leaf]
            is_like = isinstance(theirs, Tensor) and theirs.shape == ours.shape
            error = _relative(ours, theirs) if is_like else torch.inf
            if not error <= allowed:
                raise InputError(
                    f"{self.region.name}: {', '.join(changed)} is not what the circuit was "
                    f"compiled with, and changes the result by {error:.2g} of its range; the "
                    f"circuit holds it as a constant. If it is a padding mask, run each prompt "
                    f"alone and unpadded; if it is a cache, pass use_cache=False."
                )

    def _in_float32(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """Run the original, in single precision so that rounding does not look like a change."""

        def widen(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

        module = self.original
        if any(p.dtype != torch.float32 for p in module.parameters() if p.is_floating_point()):
            module = copy.deepcopy(module).float()
        with torch.no_grad():
            output = module(
                *pytree.tree_map(widen, tuple(args)), **pytree.tree_map(widen, dict(kwargs))
            )
        return pytree.tree_leaves(output)

    def _output(self, results: list[Tensor], is_as_recorded: bool) -> Any:
        leaves, spec = pytree.tree_flatten(self.signature.output)
        if not is_as_recorded:  # a constant of another shape than this call's
            leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for leaf, result in zip(self.signature.results, results, strict=True):
            leaves[leaf] = result
        return pytree.tree_unflatten(leaves, spec)


def _relative(ours: Tensor, theirs: Tensor) -> float:
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

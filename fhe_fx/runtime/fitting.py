"""Fits the inputs of a call to a circuit: sample by sample, padded to the length of the circuit.

A circuit has one shape. A batch runs it once for each sample; a shorter prompt is padded where it
is proved that the rows which are appended cannot change those that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fhe_fx.errors import InputError
from fhe_fx.runtime.causality import digest_of_clear
from fhe_fx.runtime.region import Region, as_given
from fhe_fx.runtime.signature import Signature

__all__ = ["Fitted", "Fitting", "Rows"]


@dataclass(frozen=True)
class Rows:
    """How the rows of a call lie in those of the circuit; equal where the call fits."""

    given: int
    compiled: int
    axes: tuple[tuple[int, ...], ...]
    """The axis of each encrypted input that holds them; of a clear one any number."""


@dataclass(frozen=True)
class Fitted:
    """A call as the circuit takes it."""

    samples: list[list[Tensor]]
    """One list of inputs for each sample."""
    rows: Rows | None
    """How the call is shorter than the circuit; None if it is not."""
    result_axes: dict[int, int]
    """The axis of each result that holds rows, where the call is shorter."""

    def cut(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Keep the rows of a sample's results that were asked for."""
        if self.rows is None:
            return list(results)
        axes, given = self.result_axes, self.rows.given
        return [r.narrow(axes[k], 0, given) for k, r in enumerate(results)]


@dataclass(frozen=True)
class Fitting:
    """How calls of a submodule fit its region."""

    region: Region
    signature: Signature

    def inputs(self, leaves: dict[str, Any]) -> list[Tensor]:
        """Return the inputs of the region among the leaves of a call.

        Raises:
            InputError: if one is missing or does not fit; names it.
        """
        return [self._input(name, leaves) for name in self.signature.encrypted]

    def fitted(self, inputs: Sequence[Tensor]) -> Fitted:
        """Take the samples apart, and make them as long as the circuit.

        Args:
            inputs: what `inputs` returned.

        Raises:
            InputError: if appended rows could change the results.
        """
        n_samples, rows = self._n_samples(inputs), self._rows(inputs)
        if rows is None or not self.signature.clear:
            axes = self._result_axes(rows)
            return Fitted(self._samples(inputs, n_samples, rows, is_hidden=False), rows, axes)
        for is_hidden in (False, True):
            samples = self._samples(inputs, n_samples, rows, is_hidden=is_hidden)
            found = [self.region.causal_under(*self._question(s, rows)) for s in samples]
            if found[0] is not None and all(axes == found[0] for axes in found):
                return Fitted(samples, rows, found[0])
        raise self._not_causal(rows)

    def asked_of(self, inputs: Sequence[Tensor]) -> tuple[str, dict[int, int]]:
        """Return the digest of a shorter call's clear inputs, and what was proved under them.

        Args:
            inputs: those of the circuit, for one sample, all as much shorter than it.

        Raises:
            InputError: if appended rows could change the results.
        """
        fitted = self.fitted(inputs)
        (sample,) = fitted.samples
        assert fitted.rows is not None, "the call is as long as the circuit"
        return digest_of_clear(*self._question(sample, fitted.rows)), fitted.result_axes

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
        counts = [x.shape[0] // shape[0] for x, shape in self._with_shapes(inputs)]
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

    def _rows(self, inputs: Sequence[Tensor]) -> Rows | None:
        """Return how the call is shorter than the circuit, or None if it is not."""
        axes: list[tuple[int, ...]] = []
        found: set[tuple[int, int] | None] = set()
        for name, (x, shape) in zip(
            self.signature.encrypted, self._with_shapes(inputs), strict=True
        ):
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
        return Rows(given, compiled, tuple(axes))

    def _question(
        self, sample: Sequence[Tensor], rows: Rows
    ) -> tuple[list[int | None], dict[int, Tensor], int]:
        """Return what `Region.causal_under` is asked of a sample."""
        named = enumerate(zip(self.signature.encrypted, sample, strict=True))
        clear = {k: as_given(x) for k, (name, x) in named if name in self.signature.clear}
        axes = [None if k in clear else a[0] for k, a in enumerate(rows.axes)]
        return axes, clear, rows.given

    def _samples(
        self, inputs: Sequence[Tensor], n_samples: int, rows: Rows | None, *, is_hidden: bool
    ) -> list[list[Tensor]]:
        hidden = self.signature.clear if is_hidden else {}
        fills = [hidden.get(name) for name in self.signature.encrypted]
        return [
            [
                self._sample(x, shape, i, rows, k, fills[k])
                for k, (x, shape) in enumerate(self._with_shapes(inputs))
            ]
            for i in range(n_samples)
        ]

    @staticmethod
    def _sample(
        x: Tensor,
        shape: tuple[int, ...],
        number: int,
        rows: Rows | None,
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

    def _result_axes(self, rows: Rows | None) -> dict[int, int]:
        if rows is None:
            return {}
        axes = self.region.causal([a for (a,) in rows.axes])
        if axes is None:
            raise self._not_causal(rows)
        return axes

    def _not_causal(self, rows: Rows) -> InputError:
        under = " under the clear inputs of this call" if self.signature.clear else ""
        return InputError(
            f"{self.region.name}: {rows.given} rows were given to a circuit of {rows.compiled}, "
            f"and a row of this part may depend on later ones{under}, so it cannot be padded. "
            f"Give {rows.compiled} rows, or encrypt again"
            + (f" with max_tokens={rows.given}." if (1,) in rows.axes else ".")
        )

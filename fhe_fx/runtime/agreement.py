"""How large an error a model bears before it predicts something else.

Both questions are asked on calibration calls: whether the largest number along the last axis of the
model's first result stays where it is, at every position, when the encrypted parts return their
float results with Gaussian noise of a given size, and when they run on integers with the noise of
look-ups. The first costs forward passes only, so that a budget is found before anything is lowered
for it; the second says whether it was right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fhe_fx.backends.reference.batch import run_batch
from fhe_fx.errors import OptionsError
from fhe_fx.ir.program import Program
from fhe_fx.quant.calibration import Call
from fhe_fx.quant.lookup_noise import LookupNoise
from fhe_fx.runtime.module import EncryptedModule
from fhe_fx.runtime.region import Region
from fhe_fx.runtime.staged import IntegerRunner, Runner, Samples, StagedRegion
from fhe_fx.runtime.standin import put

__all__ = ["Agreement"]

_LEAST, _MOST, _STEPS = 1e-3, 2.0, 10
"""Errors among which the largest bearable one is searched, and halvings of that range."""
_DRAWS = 2
"""Times that noise is drawn for each call."""
_BATCH = 32
"""Calls that are made together."""


class Agreement:
    """Compares a model's predictions with the float model's.

    Args:
        model: in eval mode, with the float modules in place.
        calls: what it is asked.
        seed: of the noise.

    Raises:
        OptionsError: if the model returns no floating-point tensor to predict from.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call], seed: int) -> None:
        self._model, self._seed = model, seed
        self._calls = _batched(calls)
        self._expected = self._predictions()

    def error_at(self, target: float, parts: Sequence[EncryptedModule]) -> float:
        """Return the largest error at which predictions agree as often as `target`.

        Args:
            target: part of the predictions, from 0 to 1.
            parts: the encrypted parts, one circuit each.

        Returns:
            Root mean square, in parts of the deviation of each result of the encrypted parts.
        """
        low, high = math.log(_LEAST), math.log(_MOST)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            disturbed = partial(_Disturbed, error=math.exp(middle), seed=self._seed)
            if self.of(parts, disturbed) < target:
                high = middle
            else:
                low = middle
        return math.exp(low)

    def simulated(self, parts: Sequence[EncryptedModule]) -> float:
        """Return how often predictions agree on integers, with the noise of look-ups."""
        return self.of(parts, lambda region: _Noisy(region.program, self._seed))

    def of(self, parts: Sequence[EncryptedModule], runner: Callable[[Region], Runner]) -> float:
        """Return how often predictions agree when runners play the circuits."""
        played: dict[nn.Module, nn.Module] = {}
        for part in parts:
            region = StagedRegion.of(part.region, runner(part.region))
            played[part.original] = stand_in = EncryptedModule(
                part.original, region, part.signature
            )
            stand_in.mode = "clear"
        put(self._model, played)
        try:
            found = [self._predictions() for _ in range(_DRAWS)]
        finally:
            put(self._model, {stand_in: original for original, stand_in in played.items()})
        same = [
            (ours == theirs).flatten()
            for predictions in found
            for ours, theirs in zip(predictions, self._expected, strict=True)
        ]
        return float(torch.cat(same).float().mean())

    def _predictions(self) -> list[Tensor]:
        found = []
        with torch.no_grad():
            for call in self._calls:
                leaves = pytree.tree_leaves(self._model(*call.args, **call.kwargs))
                scores = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
                scores = [x for x in scores if x.dim() and x.shape[-1] > 1]
                if not scores:
                    raise OptionsError(
                        f"target_agreement compares the largest of the model's results, and "
                        f"{type(self._model).__name__} returns none with several numbers. "
                        f"Give max_error instead."
                    )
                found.append(scores[0].argmax(-1))
        return found


class _Disturbed:
    """Float results with noise."""

    def __init__(self, region: Region, error: float, seed: int) -> None:
        self._captured, self._error = region.captured, error
        self._generator = torch.Generator().manual_seed(seed)
        results = zip(*[region.captured(*s) for s in region.captured.samples], strict=True)
        self._sizes = [float(torch.stack(r).double().std()) for r in results]

    def __call__(self, samples: Samples) -> list[list[Tensor]]:
        """Run the float program."""
        return [
            [
                r + self._error * size * torch.randn(r.shape, generator=self._generator)
                for r, size in zip(self._captured(*inputs), self._sizes, strict=True)
            ]
            for inputs in samples
        ]


class _Noisy(IntegerRunner):
    """Integers with the noise of look-ups."""

    def __init__(self, program: Program, seed: int) -> None:
        super().__init__(program)
        self._noise = LookupNoise.of(program.options.chosen_p_error, seed)

    def __call__(self, samples: Samples) -> list[list[Tensor]]:
        """Run the integer program."""
        return self.decode(run_batch(self.program, self.encode(samples), noise=self._noise))


def _batched(calls: Sequence[Call]) -> list[Call]:
    """Make calls together, where every tensor of every call holds one sample."""
    first = calls[0]
    alike = all(
        all(t.dim() and t.shape[0] == 1 for t in call.tensors())
        and len(call.args) == len(first.args)
        and call.kwargs.keys() == first.kwargs.keys()
        for call in calls
    )
    if not alike:
        return list(calls)
    return [_together(calls[i : i + _BATCH]) for i in range(0, len(calls), _BATCH)]


def _together(calls: Sequence[Call]) -> Call:
    def joined(values: Sequence[object]) -> object:
        tensors = [v for v in values if isinstance(v, Tensor)]
        return torch.cat(tensors) if len(tensors) == len(values) else values[0]

    args = [joined(values) for values in zip(*[c.args for c in calls], strict=True)]
    return Call(tuple(args), {k: joined([c.kwargs[k] for c in calls]) for k in calls[0].kwargs})

"""What the float model says of every sentence, which each setting and stage is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fhe_fx.evaluate.metrics import Tally, position_sums
from fhe_fx.evaluate.results import StageResult
from fhe_fx.evaluate.texts import DataError

__all__ = ["FloatRun", "batches", "next_logits", "outputs_of"]

_BATCH = 16
_MAX_BYTES = 4 << 30
"""Float logits that are kept, at most."""


def batches(rows: Sequence[Tensor]) -> list[Tensor]:
    """Stack sentences of equal length, `[n, tokens]` each: none is padded."""
    lengths = sorted({len(row) for row in rows})
    groups = [torch.stack([r for r in rows if len(r) == length]) for length in lengths]
    return [part for group in groups for part in group.split(_BATCH)]


def next_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return what a language model predicts after each token, `[n, tokens, vocabulary]`.

    Raises:
        DataError: if it is not a language model.
    """
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes:
        raise DataError(
            f"{type(model).__name__} takes no input_ids; only language models can be evaluated."
        )
    output = model(input_ids=ids, **({"use_cache": False} if "use_cache" in takes else {}))
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise DataError(
            f"{type(model).__name__} returns no logits of next tokens, which are what is compared. "
            f"Load the model with its language head."
        )
    return logits


@contextmanager
def outputs_of(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the first result of each submodule at its last call."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[path] = next(x for x in tree_leaves(output) if isinstance(x, Tensor)).detach()

        return hook

    handles = [model.get_submodule(p).register_forward_hook(keep(p)) for p in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class FloatRun:
    """What the float model says, which every setting is compared with."""

    def __init__(self, model: nn.Module, paths: Sequence[str], texts: Sequence[Tensor]) -> None:
        self.batches, self.paths = texts, paths
        self.logits: list[Tensor] = []
        self.outputs: list[dict[str, Tensor]] = []
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), outputs_of(model, paths) as found:
                for ids in texts:
                    self.logits.append(next_logits(model, ids))
                    self.outputs.append(dict(found))
                    self._check_size()
        finally:
            model.train(was_training)
        self.energy = {
            p: float(sum(o[p].double().square().sum() for o in self.outputs)) for p in paths
        }

    def _check_size(self) -> None:
        first = self.logits[0]
        each = first.numel() * first.element_size() / self.batches[0].numel()
        total = each * sum(ids.numel() for ids in self.batches)
        if total > _MAX_BYTES:
            fit = int(_MAX_BYTES / each)
            raise DataError(
                f"The predictions to compare with would take {total / 1e9:.1f} GB. Give fewer "
                f"sentences, {fit:,} tokens at most."
            )

    def add(
        self, tally: Tally, number: int, logits: Tensor, outputs: dict[str, Tensor] | None
    ) -> None:
        """Compare what a stage says of one batch."""
        position_sums(tally, self.logits[number], logits, self.batches[number])
        if outputs is None:
            return
        # Modules weigh alike: each error is taken relative to the whole energy of its module.
        error, reference = torch.zeros(2, len(logits), dtype=torch.float64)
        for path in self.paths:
            exact = self.outputs[number][path].double()
            ours = outputs[path].double()
            error += (ours - exact).square().flatten(1).sum(1) / self.energy[path]
            reference += exact.square().flatten(1).sum(1) / self.energy[path]
        tally.add("relative_error", error, reference)

    def stage(self) -> StageResult:
        """Return the float model's own figures: its perplexity, the rest by definition."""
        tally = Tally()
        for number, logits in enumerate(self.logits):
            self.add(tally, number, logits, self.outputs[number])
        return StageResult("float", tally.estimates())

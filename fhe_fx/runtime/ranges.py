"""How often values were outside the ranges that calibration found, counted while a program runs.

Ranges are chosen for the least error, not so that nothing passes them: some calibration values lie
outside, too. So a use is compared with that of the calibration inputs, and a warning is due where
values are outside more often than a stated share and than there, beyond chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fhe_fx.backends.reference.batch import run_batch
from fhe_fx.ir.program import Program
from fhe_fx.ir.types import ValueType
from fhe_fx.ir.views import Lookup
from fhe_fx.runtime.codec import Codec

__all__ = ["RANGE_SHARE", "RangeUse", "RangeWatch", "clips", "range_warnings", "wraps"]

RANGE_SHARE = 0.001
"""Share of values outside their range from which a warning is due."""
CHANCE = 0.01
"""Probability with which so many values may be outside by chance alone, at most, for a warning."""


@dataclass
class RangeUse:
    """How often the values of one look-up, or of one input, were outside their range."""

    where: str
    """Module path and source line."""
    outside: int = 0
    total: int = 0
    calibrated: float = 0.0
    """Share of the calibration inputs' values that were outside."""

    @property
    def share(self) -> float:
        """Part of the values that were outside."""
        return self.outside / max(1, self.total)

    @property
    def is_exceeded(self) -> bool:
        """Whether a warning is due."""
        from scipy.stats import binom  # a second of imports, needed here alone

        usual = max(RANGE_SHARE, self.calibrated)
        by_chance = float(binom.sf(self.outside - 1, self.total, usual))
        return self.share > usual and by_chance < CHANCE

    def count(self, is_outside: Tensor) -> None:
        """Add some values."""
        self.outside += int(is_outside.sum())
        self.total += is_outside.numel()


class RangeWatch:
    """Runs a program on integers, and counts for every input and look-up what was outside."""

    def __init__(self, program: Program, *, is_calibration: bool = False) -> None:
        self.program, self.codec = program, Codec.of(program)
        self.uses: dict[str, RangeUse] = {}
        self._calibrated: dict[str, float] | None = {} if is_calibration else None

    def run(self, samples: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Run in the clear on real inputs of the region, one list of real results a sample."""
        for node in self.program.placeholders:
            for sample in samples:
                is_clipped = clips(node, sample[self.program.source_of(node)])
                self._use(node, f"encrypted input {node.name}").count(is_clipped)
        encoded = [self.codec.encode(inputs) for inputs in samples]
        stacked = [
            torch.stack([torch.from_numpy(q) for q in port]) for port in zip(*encoded, strict=True)
        ]
        results = run_batch(self.program, stacked, observe=self._look_up)
        rows = zip(*results, strict=True)
        return [self.codec.decode([r.numpy() for r in row]) for row in rows]

    def _look_up(self, node: fx.Node, x: Tensor) -> None:
        where = f"{node.meta.get('module_path', '')} {node.meta.get('source', '')}".strip()
        self._use(node, where).count(wraps(Lookup.of(node), x))

    def _use(self, node: fx.Node, where: str) -> RangeUse:
        if node.name not in self.uses:
            self.uses[node.name] = RangeUse(where, calibrated=self._usual().get(node.name, 0.0))
        return self.uses[node.name]

    def _usual(self) -> dict[str, float]:
        """Return the share outside of each input and look-up on the calibration inputs."""
        if self._calibrated is None:
            watch = RangeWatch(self.program, is_calibration=True)
            if self.program.samples:
                watch.run(self.program.samples)
            self._calibrated = {name: use.share for name, use in watch.uses.items()}
        return self._calibrated

    def exceeded(self) -> list[RangeUse]:
        """Return those with values outside, the most frequent first."""
        return sorted((u for u in self.uses.values() if u.outside), key=lambda u: -u.share)


def clips(node: fx.Node, real: Tensor) -> Tensor:
    """Say of each real value of an encrypted input whether it lies beyond its encoding."""
    t: ValueType = node.meta["type"]
    whole = ((real.detach().double() - t.offset) / t.scale).round()
    return (whole < t.low) | (whole > t.high)


def wraps(view: Lookup, x: Tensor) -> Tensor:
    """Say of each integer that a look-up reads whether it lies beyond its table."""
    rounded = (x + (1 << view.lsbs - 1) >> view.lsbs) if view.lsbs else x
    half = 1 << view.bits - 1
    return (rounded < -half) | (rounded >= half)


def range_warnings(uses: Iterable[RangeUse]) -> list[str]:
    """Warn of what was outside its range too often."""
    often = sorted((u for u in uses if u.is_exceeded), key=lambda u: -u.share)
    if not often:
        return []
    worst = often[0]
    beyond = f"{len(often)} look-ups or inputs had more than {RANGE_SHARE:.1%} of their values"
    shares = f"{worst.share:.2%} of {worst.total:,} (calibration: {worst.calibrated:.2%})"
    text = (
        f"{beyond} outside the calibrated range, and more than calibration had; the worst, "
        f"{worst.where}, {shares}. Calibrate on text like this."
    )
    return [text]

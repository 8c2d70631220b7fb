"""A region at one stage of its way to ciphertext, run on many sentences at once.

* `fake_quantized`: the float program with activations rounded to their slots; weights are exact
  and no range ends. What differs from float here is precision.
* `clear`: the integers. What differs from the stage before is ranges, and weights.
* `simulated`: the integers with the noise of bootstraps. What differs from `clear` is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from fhe_fx.backends.reference.batch import run_batch
from fhe_fx.backends.reference.noise import LookupNoise
from fhe_fx.evaluate.fake import fake_quantized
from fhe_fx.ir.program import Program
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.ranges import RangeUse, RangeWatch
from fhe_fx.runtime.region import Region

__all__ = ["STAGES", "Clear", "FakeQuantized", "Runner", "Simulated", "StagedRegion"]

STAGES = ("fake_quantized", "clear", "simulated")
"""What a setting can be evaluated at, in the order of the way."""

Samples = Sequence[Sequence[Tensor]]


class Runner(Protocol):
    """Runs the encrypted part on real inputs, one list of tensors a sample."""

    def __call__(self, samples: Samples) -> list[list[Tensor]]:
        """Return one list of results a sample."""


@dataclass
class StagedRegion(Region):
    """A region whose circuit is played by a runner."""

    runner: Runner | None = None

    @staticmethod
    def of(region: Region, runner: Runner) -> StagedRegion:
        """Return the region with a runner in place of its circuit."""
        given = {f.name: getattr(region, f.name) for f in fields(Region)}
        return StagedRegion(**given, runner=runner)

    def run_circuits(self, samples: Samples, mode: str) -> list[list[Tensor]]:
        """Let the runner run."""
        assert self.runner is not None
        return self.runner(samples)


class FakeQuantized:
    """The float program with rounded activations."""

    def __init__(self, region: Region) -> None:
        self.program = fake_quantized(region)

    def __call__(self, samples: Samples) -> list[list[Tensor]]:
        """Run the float program."""
        reals = [torch.stack(list(x)) for x in zip(*samples, strict=True)]
        inputs = [reals[self.program.source_of(n)] for n in self.program.placeholders]
        results = run_batch(self.program, inputs)
        return [[r.float() for r in row] for row in zip(*results, strict=True)]


class _Integers:
    """Runs an integer program between encoding and decoding."""

    def __init__(self, program: Program) -> None:
        self.program, self.codec = program, Codec.of(program)

    def encode(self, samples: Samples) -> list[Tensor]:
        encoded = [self.codec.encode(inputs) for inputs in samples]
        return [
            torch.stack([torch.from_numpy(q) for q in port]) for port in zip(*encoded, strict=True)
        ]

    def decode(self, results: Sequence[Tensor]) -> list[list[Tensor]]:
        rows = zip(*results, strict=True)
        return [self.codec.decode([r.numpy() for r in row]) for row in rows]


class Clear:
    """The integers, and how well calibrated ranges fit them."""

    def __init__(self, program: Program) -> None:
        self._watch = RangeWatch(program)

    def __call__(self, samples: Samples) -> list[list[Tensor]]:
        """Run the integer program."""
        return self._watch.run(samples)

    @property
    def ranges(self) -> dict[str, RangeUse]:
        """How often what each input and look-up holds was outside its range, by node."""
        return self._watch.uses


class Simulated(_Integers):
    """The integers with noise, and how far they then are from the integers without."""

    def __init__(self, program: Program, seed: int) -> None:
        super().__init__(program)
        p_error = program.options.chosen_p_error
        self._noise = LookupNoise.of(p_error, seed)
        self._saturating = LookupNoise.of(p_error, seed, saturates=True)
        self._squares = torch.zeros(2, dtype=torch.float64)

    def __call__(self, samples: Samples) -> list[list[Tensor]]:
        """Run the integer program with noise."""
        encoded = self.encode(samples)
        clear = self.decode(run_batch(self.program, encoded))
        found = self.decode(run_batch(self.program, encoded, noise=self._noise))
        modelled = self.decode(run_batch(self.program, encoded, noise=self._saturating))
        for place, runs in enumerate((found, modelled)):
            for run, exact in zip(runs, clear, strict=True):
                for a, b in zip(run, exact, strict=True):
                    self._squares[place] += (a - b).double().square().sum()
        return found

    @property
    def excess(self) -> float:
        """Root mean square distance from the clear integers, in units of what noise explains.

        Noise explains the distance that is left when it cannot push a value past its range.
        """
        found, modelled = self._squares.tolist()
        return (
            float((found / modelled) ** 0.5) if modelled > 0 else (1.0 if not found else torch.inf)
        )

"""A region at one stage of its way to ciphertext, run on many sentences at once.

* `fake_quantized`: the float program with activations rounded to their slots; weights are exact
  and no range ends. What differs from float here is precision.
* `clear`: the integers. What differs from the stage before is ranges, and weights.
* `simulated`: the integers with the noise of bootstraps. What differs from `clear` is noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fhe_fx.backends.reference.batch import run_batch
from fhe_fx.evaluate.fake import fake_quantized
from fhe_fx.ir.program import Program
from fhe_fx.quant.lookup_noise import LookupNoise
from fhe_fx.runtime.ranges import RangeUse, RangeWatch
from fhe_fx.runtime.region import Region
from fhe_fx.runtime.staged import IntegerRunner, Samples

__all__ = ["STAGES", "Clear", "FakeQuantized", "Simulated"]

STAGES = ("fake_quantized", "clear", "simulated")
"""What a setting can be evaluated at, in the order of the way."""


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


class Simulated(IntegerRunner):
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

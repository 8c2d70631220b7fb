"""A region whose circuit is played by something else, on many samples at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from fhe_fx.ir.program import Program
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.region import Region

__all__ = ["IntegerRunner", "Runner", "Samples", "StagedRegion"]

Samples = Sequence[Sequence[Tensor]]
"""One list of tensors a sample."""


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


class IntegerRunner:
    """Runs an integer program between encoding and decoding."""

    def __init__(self, program: Program) -> None:
        self.program, self.codec = program, Codec.of(program)

    def encode(self, samples: Samples) -> list[Tensor]:
        """Quantize all samples: one stack for each input of the circuit."""
        encoded = [self.codec.encode(inputs) for inputs in samples]
        return [
            torch.stack([torch.from_numpy(q) for q in port]) for port in zip(*encoded, strict=True)
        ]

    def decode(self, results: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return real results, one list a sample."""
        rows = zip(*results, strict=True)
        return [self.codec.decode([r.numpy() for r in row]) for row in rows]

"""The reference backend: the integer program run in torch int64, which defines what it means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fhe_fx.backends.base import CircuitFacts, Integers
from fhe_fx.backends.reference.batch import run_batch
from fhe_fx.errors import BackendError
from fhe_fx.ir.program import Program

__all__ = ["ReferenceBackend", "ReferenceCircuit"]


class ReferenceCircuit:
    """Runs a program as the fx graph that it is."""

    facts: CircuitFacts | None = None

    def __init__(self, program: Program) -> None:
        self._program = program

    def clear(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Run on integers, one array for each placeholder."""
        with torch.no_grad():
            results = self._program.module(*[torch.from_numpy(x) for x in inputs])
        return [r.numpy() for r in results]

    def clear_many(self, samples: Sequence[Sequence[Integers]]) -> list[list[Integers]]:
        """Run on many samples at once; the same integers as one by one."""
        stacked = [torch.from_numpy(np.stack(x)) for x in zip(*samples, strict=True)]
        results = [r.numpy() for r in run_batch(self._program, stacked)]
        return [[r[i] for r in results] for i in range(len(samples))]

    def simulate(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Refuse: the reference has no noise."""
        raise BackendError("The reference backend has no noise to simulate. Use mode 'clear'.")

    def execute(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Refuse: the reference has no keys."""
        raise BackendError("The reference backend does not encrypt. Compile with Concrete.")


class ReferenceBackend:
    """Compiles to nothing: the graph itself runs."""

    name = "reference"

    def compile(self, program: Program) -> ReferenceCircuit:
        """Wrap the program.

        Raises:
            BackendError: if the program is not in the integer stage.
        """
        if "integer" not in program.properties:
            raise BackendError(
                f"{program.name} is not lowered to integers; run the pipeline first."
            )
        return ReferenceCircuit(program)

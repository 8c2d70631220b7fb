"""Run the calibration samples and keep the value of every node.

Exact: the graph is not changed. Ranges, scales and the centres of squares come from these values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fhe_fx.errors import CalibrationError
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["Calibrate"]


@register
@dataclass(frozen=True)
class Calibrate(Pass):
    """Fill `program.observed`, and show the bounds in the printed program."""

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    gives: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    def run(self, program: Program) -> bool:
        """Interpret the program on all samples.

        Raises:
            CalibrationError: if there is no sample, or a value is not finite.
        """
        if not program.samples:
            raise CalibrationError(
                f"{program.name}: there are no calibration samples. Pass calibration=[...]."
            )
        before = str(program)
        program.observed = program.values(program.samples)
        for node in program.encrypted():
            values = program.observed[node.name]
            if not bool(torch.isfinite(values).all()):
                sample = int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])
                raise CalibrationError(
                    f"{program.name}: {node.name} ({node.meta.get('module_path', '')}, "
                    f"{node.meta.get('source', '')}) is not finite on calibration sample {sample}. "
                    f"Check the weights and the calibration data for nan and inf."
                )
            node.meta["bounds"] = (float(values.min()), float(values.max()))
        return str(program) != before

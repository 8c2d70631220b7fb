"""What a backend is: it compiles an integer program to a circuit, and a circuit runs integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fhe_fx.ir.program import Program

__all__ = ["Backend", "Circuit", "CircuitFacts", "Integers"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CircuitFacts:
    """What a compiled circuit costs, as its compiler says."""

    look_ups: int
    """Programmable bootstraps of one run."""
    complexity: float
    """The compiler's estimate of the work of one run, in its own unit."""
    max_lookup_bits: int
    """Input bits of the widest look-up."""
    p_error: float
    """Probability that one look-up reads a neighbouring entry."""
    key_bytes: int
    """Evaluation keys: bootstrap and key-switching keys, as the server holds them."""
    input_bytes: int
    """Encrypted inputs of one run."""
    output_bytes: int
    """Encrypted results of one run."""
    compile_seconds: float
    """How long compilation took on the machine that compiled."""
    parameters: tuple[str, ...] = field(default_factory=tuple)
    """The bootstrap parameter sets, in words."""
    has_own_keys: bool = True
    """False if it runs with the keys of another circuit, and `key_bytes` are those."""


class Circuit(Protocol):
    """A program that a backend can run on integers."""

    @property
    def facts(self) -> CircuitFacts | None:
        """What it costs; None if it costs nothing."""

    def clear(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Run on integers in the clear: the program's meaning."""

    def simulate(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Run in the clear with the noise that encryption would add."""

    def execute(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Encrypt, run, decrypt."""


@runtime_checkable
class Backend(Protocol):
    """Compiles integer programs."""

    name: str

    def compile(self, program: Program) -> Circuit:
        """Compile a program.

        Raises:
            BitWidthError: if a look-up or an accumulator is too wide for the backend.
            BackendError: if the backend refuses the program for another reason.
        """

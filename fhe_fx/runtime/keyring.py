"""Circuits that use one set of keys: those of several lengths of a part, or of several parts.

Keys fit every circuit of equal parameters. The optimizer gives each circuit the smallest that it
needs, which are nearly the same for circuits of one precision; so the others are compiled again for
the largest, at a price of a few percent, and a client makes, sends and keeps one set of keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.program import Program
from fhe_fx.ir.views import Lookup
from fhe_fx.options import Options
from fhe_fx.passes import Pipeline
from fhe_fx.runtime.lower import Lowerer

if TYPE_CHECKING:
    from fhe_fx.runtime.region import Region

__all__ = ["Keyring", "LoweredAlike"]


@dataclasses.dataclass
class LoweredAlike:
    """Lowers several regions so that their circuits can have keys in common.

    Keys fit look-ups of one width and `p_error`. Those of the first region are allotted, one for
    all of its look-ups; the others take them.
    """

    lower: Lowerer
    options: Options | None = None

    def __call__(self, captured: Program, pipeline: Pipeline) -> Program:
        """Lower one region."""
        one = dataclasses.replace(captured.options, most_widths=1)
        captured.options = self.options or one
        program = self.lower(captured, pipeline)
        if self.options is None and not captured.options.is_uniform:
            self.options = _as_wide(program)
        return program


def _as_wide(program: Program) -> Options:
    """Return options that give every look-up the widest that a program has."""
    options = program.options
    widest = max((Lookup.of(n).bits for n in program.calls(LOOKUP)), default=options.lookup_bits)
    extra = max(0, widest - options.n_bits)
    return dataclasses.replace(options, lookup_extra_bits=extra, max_error=None, max_cost=None)


class Keyring:
    """Regions that share keys where their parameters allow it."""

    def __init__(self, regions: Sequence[Region]) -> None:
        """Tell each region that it is one of these."""
        self._regions = tuple(regions)
        for region in regions:
            region.keyring = self

    def compile(self) -> None:
        """Compile all of them: each for itself, then for the keys of the one with the largest.

        Where these do not suffice for a circuit, it has keys of its own.

        Raises:
            BitWidthError: if no parameters exist for one.
        """
        from fhe_fx.backends.concrete import ConcreteBackend

        own = [region.compiled() for region in self._regions]
        largest = max(reversed(own), key=lambda circuit: circuit.facts.key_bytes)
        for region, circuit in zip(self._regions, own, strict=True):
            region.use(ConcreteBackend().rekeyed(circuit, largest))

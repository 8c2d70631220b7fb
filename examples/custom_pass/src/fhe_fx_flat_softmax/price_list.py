"""A backend that compiles nothing: it counts look-ups and adds up a price for each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fhe_fx.backends import CircuitFacts
from fhe_fx.backends.base import Integers
from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.errors import BackendError, BitWidthError
from fhe_fx.ir import Program
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.views import Lookup

PRICES = {4: 4.1e7, 5: 5.9e7, 6: 9.7e7, 7: 2.3e8, 8: 5.2e8}
"""Complexity of one look-up by its bits, up to 6 bits as concrete-python 2.11 has it at
p_error 0.1; narrower ones cost as much as 4 bits, and each bit more doubles the last."""
WIDEST = 12
"""Bits for which the imagined machine has parameters."""


def price(bits: int) -> float:
    """Return what one look-up of so many bits costs."""
    least, most = min(PRICES), max(PRICES)
    return PRICES[min(max(bits, least), most)] * 2.0 ** max(0, bits - most)


class PricedCircuit:
    """A program with a price; it runs in the clear alone."""

    def __init__(self, program: Program, facts: CircuitFacts) -> None:
        self.facts = facts
        self._reference = ReferenceBackend().compile(program)

    def clear(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Run by the reference."""
        return self._reference.clear(inputs)

    def simulate(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Refuse."""
        raise BackendError("The backend price-list only counts. Use mode 'clear'.")

    def execute(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Refuse."""
        raise BackendError("The backend price-list only counts. Compile with Concrete.")


class PriceList:
    """Prices a program in no time."""

    name = "price-list"

    def compile(self, program: Program) -> PricedCircuit:
        """Count look-ups by their bits.

        Raises:
            BitWidthError: if the machine has no parameters for one.
        """
        counts: Counter[int] = Counter()
        for node in program.calls(LOOKUP):
            counts[Lookup.of(node).bits] += math.prod(d.shape_of(node))
        widest = max(counts, default=0)
        if widest > WIDEST:
            raise BitWidthError(
                f"{program.name}: a look-up reads {widest} bits; the price list ends at {WIDEST}. "
                f"Try a smaller n_bits."
            )
        complexity = sum(n * price(bits) for bits, n in counts.items())
        facts = CircuitFacts(
            look_ups=counts.total(),
            complexity=complexity,
            max_lookup_bits=widest,
            p_error=program.options.chosen_p_error,
            key_bytes=0,
            input_bytes=0,
            output_bytes=0,
            compile_seconds=0.0,
        )
        return PricedCircuit(program, facts)

"""Circuits that use one set of keys: those of several lengths of a part, or of several parts.

Keys fit every circuit of equal parameters. The optimizer gives each circuit the smallest that it
needs, which are nearly the same for circuits of one precision; so the others are compiled again for
the largest, at a price of a few percent, and a client makes, sends and keeps one set of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fhe_fx.runtime.region import Region

__all__ = ["Keyring"]


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

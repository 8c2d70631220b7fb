"""How a cost grows with the number of tokens: the law fitted to what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from measure import Row

FEWEST = 3
"""Lengths that a law of two coefficients needs, so that one at least can speak against it."""


@dataclass(frozen=True)
class Law:
    """A cost of `pairs` T² + `tokens` T for T tokens.

    Attention does some of its work for each token and some for each pair of tokens. A causal mask
    leaves T (T + 1) / 2 of the pairs, which is of the same form.
    """

    pairs: float
    tokens: float
    farthest: float = 0.0
    """Relative deviation of the point that is farthest from the law."""
    ahead: float = 0.0
    """Relative deviation of the longest length from the law of the shorter ones alone."""

    @staticmethod
    def of(points: Iterable[tuple[float, float]]) -> Law | None:
        """Fit by least squares of the relative deviations, so that every length counts alike.

        Args:
            points: number of tokens and cost of each length; fewer than three have no law.
        """
        found = sorted(dict(points).items())
        if len(found) < FEWEST:
            return None
        law, shorter = _fitted(found), _fitted(found[:-1])
        farthest = max((law.deviation(*point) for point in found), key=abs)
        return Law(law.pairs, law.tokens, farthest, shorter.deviation(*found[-1]))

    def __call__(self, tokens: Any) -> Any:
        """Return the cost of a number of tokens, or of an array of them."""
        return self.pairs * tokens**2 + self.tokens * tokens

    def deviation(self, tokens: float, cost: float) -> float:
        """Return by how much a cost is more than the law's, in parts of the law's."""
        return float(cost / self(tokens) - 1)

    def __str__(self) -> str:
        sign = "-" if self.tokens < 0 else "+"
        return f"{digits(self.pairs)} T² {sign} {digits(abs(self.tokens))} T"


def _fitted(points: Sequence[tuple[float, float]]) -> Law:
    tokens, costs = np.array(points, dtype=float).T
    terms = np.stack([tokens**2, tokens], 1) / costs[:, None]
    pairs, linear = np.linalg.lstsq(terms, np.ones(len(points)), rcond=None)[0]
    return Law(float(pairs), float(linear))


def digits(number: float) -> str:
    """Return a number to three digits, 53.2, 1,070 or 5.27e9."""
    if number >= 1e6:
        return f"{number:.2e}".replace("e+0", "e").replace("e+", "e")
    return f"{float(f'{number:.3g}'):,.0f}" if number >= 100 else f"{number:.3g}"


# Rows -----------------------------------------------------------------------------------------


def price(row: Row) -> float:
    """Return the complexity, predicted where it was not compiled."""
    return float(row.get("complexity") or row["predicted_complexity"])


def look_ups(row: Row) -> float:
    """Return the number of look-ups."""
    return float(row["look_ups"])


COSTS = {"look_ups": look_ups, "complexity": price}


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows that grow by what they are of, in order of the length, those by hand last."""
    grown = [r for r in rows if r["kind"] == "growth" and "left_out" not in r]
    found: dict[str, list[Row]] = {}
    for row in [*grown, *(r["naive"] for r in grown if "naive" in r)]:
        found.setdefault(row["part"], []).append(row)
    return {part: sorted(own, key=lambda r: r["tokens"]) for part, own in found.items()}


def laws(rows: Sequence[Row]) -> list[Row]:
    """Return the law of each cost of whatever grows, as data, with the lengths it was fitted to."""
    found = []
    for part, own in series(rows).items():
        for name, cost in COSTS.items():
            law = Law.of((r["tokens"], cost(r)) for r in own)
            if law:
                predicted = [r["tokens"] for r in own if not r.get("complexity")]
                found.append(
                    {
                        "part": part, "cost": name, "law": str(law), **asdict(law),
                        "lengths": [r["tokens"] for r in own],
                        "predicted": predicted if name == "complexity" else [],
                    }
                )  # fmt: skip
    return found

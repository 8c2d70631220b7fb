"""What an inspection found: figures of every node, as data, as a table, as a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Inspection", "NodeErrors", "RegionErrors"]


@dataclass(frozen=True)
class NodeErrors:
    """One node of the integer program, beside the float value that it stands for."""

    node: str
    """Its name."""
    operator: str
    """What it does; for a look-up, the function that its table holds."""
    reads: tuple[str, ...]
    """Names of the nodes that it reads."""
    module_path: str
    source: str
    shape: tuple[int, ...]
    """Of one sample."""
    bits: int
    """Width of its integers."""
    lookup_bits: int | None
    """Bits that it reads, if it is a look-up."""
    low: float
    """Least real value that its encoding holds, over all elements."""
    high: float
    """Greatest one."""
    float_low: float
    """Least value in float."""
    float_high: float
    """Greatest one."""
    error: float
    """Root mean square of integer, as a real number, minus float."""
    relative_error: float
    """The same, relative to the root mean square of float."""
    slot: float | None
    """Mean width of what the look-up that reads it tells apart; None if no look-up does."""
    slots: float | None
    """Root mean square error in such slots, element by element."""
    is_minor: bool
    """Whether it only moves elements, or shifts what its integers mean: its values are those of the
    node that it reads, and tables and pages leave it out."""
    outside: int
    """Values beyond the range: of an input, clipped by the client; of what a look-up reads,
    wrapped; of a result, beyond its encoding."""
    values: int
    """How many values there were."""
    look_ups: int
    """Bootstraps of one run."""
    cost: float
    """Share of the region's look-up cost, from 0 to 1."""
    expected_outside: float | None = None
    """Share of values beyond the range that the report expects; None where nothing estimated it."""

    @property
    def outside_share(self) -> float:
        """Part of the values that were outside."""
        return self.outside / max(1, self.values)


@dataclass(frozen=True)
class RegionErrors:
    """One encrypted part."""

    name: str
    tokens: int | None
    """Length of its circuit; None where inputs are no tokens."""
    n_samples: int
    """Inputs that were run."""
    nodes: tuple[NodeErrors, ...]
    """In the order of the program."""
    result_errors: tuple[float, ...]
    """Root mean square error of each result, relative to the part's own float result."""
    threshold: float
    """Relative error from which a node counts as wrong."""
    mode: str = "clear"
    """Or "simulate": with the noise of encryption in what each look-up reads."""
    warnings: tuple[str, ...] = ()
    """What speaks against trusting the figures."""

    @property
    def first(self) -> NodeErrors | None:
        """The first node whose relative error passes the threshold."""
        return next((n for n in self.major if n.relative_error > self.threshold), None)

    @property
    def major(self) -> list[NodeErrors]:
        """The nodes that do more than move elements."""
        return [n for n in self.nodes if not n.is_minor]

    def __str__(self) -> str:
        return "\n".join([*self.headline(), *_table(self)])

    def headline(self) -> list[str]:
        """Return the region's figures, a sentence a line."""
        at = "" if self.tokens is None else f" at {self.tokens} tokens"
        errors = ", ".join(f"{e:.3f}" for e in self.result_errors)
        noisy = ", with noise" if self.mode == "simulate" else ""
        lines = [f"{self.name}{at}: relative error {errors}{noisy}, {self.n_samples} inputs"]
        if (first := self.first) is not None:
            where = f"{first.module_path} {first.source}".strip()
            lines.append(
                f"first above {self.threshold:g}: {first.node} ({first.operator}), "
                f"{first.relative_error:.3f}, {where}"
            )
        if outside := [n for n in self.nodes if n.outside]:
            worst = max(outside, key=lambda n: n.outside_share)
            share = worst.expected_outside
            expected = "" if share is None else f" ({share * worst.values:.1f} expected)"
            lines.append(
                f"{len(outside)} nodes had values outside their range; the worst, {worst.node} "
                f"({worst.operator}), {worst.outside:,} of {worst.values:,}{expected}"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, with the name of the first node above the threshold."""
        return {**asdict(self), "first": self.first.node if self.first else None}


@dataclass(frozen=True)
class Inspection:
    """Errors of the encrypted parts of a model, node by node."""

    regions: tuple[RegionErrors, ...]

    def __iter__(self) -> Iterator[RegionErrors]:
        return iter(self.regions)

    def __str__(self) -> str:
        return "\n\n".join(str(region) for region in self.regions)

    @property
    def warnings(self) -> list[str]:
        """The warnings of all regions, each naming its region."""
        return [f"{r.name}: {text}" for r in self.regions for text in r.warnings]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"regions": [region.as_dict() for region in self.regions]}

    def to_json(self) -> str:
        """Return `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def html(self) -> str:
        """Return a page that needs nothing else: each graph coloured by error or by cost."""
        from fhe_fx.inspection.page import page

        return page(self)

    def save_html(self, path: str | Path) -> Path:
        """Write the page to a file."""
        path = Path(path)
        path.write_text(self.html(), encoding="utf-8")
        return path


_COLUMNS: tuple[str, ...] = (
    "node", "operator", "bits", "float from", "to", "range from", "to", "relative", "slots",
    "outside", "cost", "source",
)  # fmt: skip
_WORDS = {0, 1, 11}
"""Columns that are not numbers."""


def _table(region: RegionErrors) -> list[str]:
    rows = [_COLUMNS, *(_row(n, n is region.first) for n in region.major)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i in _WORDS else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _row(n: NodeErrors, is_first: bool) -> tuple[str, ...]:
    return (
        n.node,
        n.operator,
        str(n.bits) if n.lookup_bits is None else f"{n.bits}:{n.lookup_bits}",
        *(f"{v:.3g}" for v in (n.float_low, n.float_high, n.low, n.high)),
        f"{n.relative_error:.3f}{'*' if is_first else ' '}",
        "" if n.slots is None else f"{n.slots:.2f}",
        f"{n.outside:,}" if n.outside else "",
        f"{n.cost:.1%}" if n.look_ups else "",
        n.source,
    )

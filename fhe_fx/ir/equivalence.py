"""Whether two programs compute the same, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhe_fx.ir.printer import format_program
from fhe_fx.ir.program import Program
from fhe_fx.ir.types import ValueType

__all__ = [
    "FLOAT_TOLERANCE",
    "INTEGER_TOLERANCE",
    "Difference",
    "first_difference",
    "recorded_values",
]

FLOAT_TOLERANCE = 2e-4
"""Of the largest value: float32, and other orders of addition."""
INTEGER_TOLERANCE = 1e-9
"""Of the largest value: integers are equal, their scales are doubles."""


@dataclass(frozen=True)
class Difference:
    """Where two programs part."""

    what: str
    """The result, or node, that differs, in words."""
    error: float
    """The largest difference."""
    size: float
    """The largest value of the first program there."""
    before: fx.Node | None
    """The node of the first program."""
    after: fx.Node | None
    """The node of the second program."""
    lines: str
    """The printed lines around it in the second program."""

    def __str__(self) -> str:
        return (
            f"{self.what} differs by {self.error:.3g}, values up to {self.size:.3g}\n{self.lines}"
        )


def first_difference(
    before: Program,
    after: Program,
    samples: Sequence[tuple[Tensor, ...]],
    tolerance: float | None = None,
) -> Difference | None:
    """Compare two programs of one stage on samples.

    The results decide. If one differs, the programs are walked in order, and the first node of the
    second that has another value than the node of the same name in the first is named: passes
    leave the names of what they do not touch.

    Args:
        before: the program as it should be.
        after: the other one.
        samples: real values of the original inputs, one tuple each.
        tolerance: of the largest value of each result or node; by default what float rounding
            allows, or next to nothing for integers.

    Returns:
        None if they agree, or if one is in integers and the other is not.
    """
    if ("integer" in before.properties) is not ("integer" in after.properties):
        return None
    if tolerance is None:
        is_integer = "integer" in before.properties
        tolerance = INTEGER_TOLERANCE if is_integer else FLOAT_TOLERANCE
    ours, theirs = _values(before, samples), _values(after, samples)
    if len(before.results) != len(after.results):
        what = f"there are {len(after.results)} results, {len(before.results)} are expected;"
        return Difference(what, float("inf"), 0.0, None, after.output_node, str(after))
    parted = [
        (number, a, b)
        for number, (a, b) in enumerate(zip(before.results, after.results, strict=True))
        if not _agree(ours[a.name], theirs[b.name], tolerance)
    ]
    if not parted:
        return None
    number, a, b = parted[0]
    known = {n.name: n for n in before.encrypted()}
    for node in after.encrypted():
        same = known.get(node.name)
        if same is None or node.name not in ours or node.name not in theirs:
            continue
        if not _agree(ours[same.name], theirs[node.name], tolerance):
            if node is b:
                break
            what = f"result {number} is another, and node {node.name}, the first that"
            return _difference(what, ours, theirs, same, node, after)
    return _difference(f"result {number}, node {b.name},", ours, theirs, a, b, after)


def _difference(
    what: str,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    before: fx.Node,
    after: fx.Node,
    program: Program,
) -> Difference:
    a, b = ours[before.name], theirs[after.name]
    error = float((a - b).abs().max()) if a.shape == b.shape else float("inf")
    lines = format_program(program, {after})
    return Difference(what, error, float(a.abs().max()), before, after, lines)


def _agree(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= tolerance * float(a.abs().max()) + 1e-6 * tolerance)


def _values(program: Program, samples: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Return the real value of every node, `[n_samples, *shape]`."""
    if not program.properties & {"integer", "normal"}:
        return recorded_values(program, samples)
    if "integer" not in program.properties:
        return {name: v.double() for name, v in program.values(samples).items()}
    encoded = []
    for sample in samples:
        row = []
        for node in program.placeholders:
            kind: ValueType = node.meta["type"]
            real = sample[program.source_of(node)].double()
            whole = ((real - kind.offset) / kind.scale).round()
            row.append(whole.clamp(kind.low, kind.high).long())
        encoded.append(tuple(row))
    own = Program(program.module, properties=program.properties)  # one value for each placeholder
    types: dict[str, ValueType] = {n.name: n.meta["type"] for n in program.encrypted()}
    return {
        name: v * types[name].scale + types[name].offset for name, v in own.values(encoded).items()
    }


def recorded_values(program: Program, samples: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Run a graph of any operators, one sample after the other.

    Returns:
        Each node's values, float64, `[n_samples, *shape]`, by name.
    """
    runs = []
    for sample in samples:
        recorder = _Recorder(program.module)
        with torch.no_grad():
            recorder.run(
                *[
                    sample[program.source_of(n)].to(n.meta["val"].dtype)
                    for n in program.placeholders
                ]
            )
        runs.append(recorder.found)
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


class _Recorder(fx.Interpreter):
    """Keeps the value of each node that is a tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n.name] = value.double()
        return value

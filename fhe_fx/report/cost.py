"""Cost tables: totals of each region and a row for each look-up node."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import fx

from fhe_fx.backends.base import CircuitFacts
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP, ROUND
from fhe_fx.ir.program import Program
from fhe_fx.ir.types import ValueType
from fhe_fx.ir.views import Lookup, Round
from fhe_fx.quant.lookup_cost import cost_table, key_size, lookup_cost
from fhe_fx.quant.noise_level import NoiseLevel
from fhe_fx.quant.overflow import Overflow
from fhe_fx.report.machine import machine_rates
from fhe_fx.report.memory import run_bytes
from fhe_fx.report.overflow import EdgeOverflow, edges_of, overflow_of, sentence, total_error

__all__ = ["NodeCost", "RegionCost", "Report", "report_on"]

_ZERO = "zero"
"""Function of a look-up that encrypts a zero, for the readings of another."""


@dataclass(frozen=True)
class NodeCost:
    """One look-up node."""

    node: str
    function: str
    module_path: str
    source: str
    look_ups: int
    input_bits: int
    accumulator_bits: int
    share: float
    """Predicted part of the region's cost, from 0 to 1."""
    error_share: float | None = None
    """Predicted part of the error that look-ups make, from 0 to 1: why it has these bits. None if
    they were not allotted."""
    overflow: Overflow | None = None
    """What lies outside its range, on inputs that calibration never saw. None if the passes did not
    estimate it."""
    readings: int = 1
    """How often each value is read, to take the mean; `look_ups` counts all."""

    @property
    def title(self) -> str:
        """Name of the function, and how often it reads a value if it does so more than once."""
        return self.function if self.readings == 1 else f"{self.function} x{self.readings}"


@dataclass(frozen=True)
class RegionCost:
    """One encrypted region."""

    name: str
    look_ups: int
    max_lookup_bits: int
    p_error: float
    nodes: tuple[NodeCost, ...]
    complexity: float | None = None
    """None until compiled, as are the sizes."""
    predicted_complexity: float | None = None
    """Of the look-ups, by the compiler's table of what one costs."""
    predicted_error: float | None = None
    """Error of the results that roundings and noise of look-ups and of the results themselves make,
    root mean square, in parts of the results' deviation, on inputs such as calibration's; None if
    widths were not allotted."""
    rounding_share: float | None = None
    """What of the square of that rounding results, and weights in front of them, makes."""
    predicted_key_bytes: int | None = None
    """Of the evaluation keys, by a table of what parameters take; `key_bytes` is exact."""
    predicted_memory_bytes: int | None = None
    """What a run holds besides the process: keys in both forms, and its ciphertexts."""
    key_bytes: int | None = None
    input_bytes: int | None = None
    output_bytes: int | None = None
    compile_seconds: float | None = None
    estimated_seconds: float | None = None
    """One run on this machine, from the complexity, predicted or exact, and the machine's rate."""
    estimated_keygen_seconds: float | None = None
    """Making the keys on this machine; None where `fhe-fx doctor` has not measured."""
    has_own_keys: bool = True
    """False if the keys are those of another region, which are made and sent once."""
    tokens: int | None = None
    """Tokens that it takes, where the region has circuits of several lengths."""
    edges: tuple[EdgeOverflow, ...] = ()
    """What of its inputs is clipped, and what of its results wraps."""
    overflow_error: float | None = None
    """Error that overflow makes in the results: root mean square, in parts of their deviation."""

    def line(self) -> str:
        """Return the one line that is said when a circuit has been compiled."""
        many = "" if self.tokens == 1 else "s"
        length = "" if self.tokens is None else f" at {self.tokens} token{many}"
        text = (
            f"{self.name}{length}: look-ups of at most {self.max_lookup_bits} bits, "
            f"{self.look_ups:,} bootstraps"
        )
        seconds = self.estimated_seconds or 0.0
        if self.complexity is None:
            predicted = self.predicted_complexity or 0.0
            return (
                f"{text}, complexity about {_scientific(predicted)}, "
                f"keys about {(self.predicted_key_bytes or 0) / 1e9:.1f} GB, "
                f"about {_seconds(seconds)} on this machine, not compiled yet"
            )
        shared = "" if self.has_own_keys else " (shared)"
        return (
            f"{text}, complexity {_scientific(self.complexity)}, "
            f"keys {(self.key_bytes or 0) / 1e9:.1f} GB{shared}, "
            f"about {_seconds(seconds)} on this machine"
        )

    def overflow_line(self) -> str | None:
        """Say what overflow remains, and where most of it does; None where nothing is known."""
        look_ups = [(f"{n.function} {n.source}".strip(), n.overflow) for n in self.nodes]
        return sentence(look_ups, self.edges, self.overflow_error)


@dataclass(frozen=True)
class Report:
    """What the encrypted parts of a model cost."""

    regions: tuple[RegionCost, ...]

    @staticmethod
    def from_costs(costs: Sequence[Mapping[str, Any]]) -> Report:
        """Make the report of regions from their costs as a manifest holds them.

        Args:
            costs: fields of RegionCost, with `nodes` as fields of NodeCost; the time is estimated
                anew, for this machine.
        """
        regions = []
        for cost in costs:
            nodes = tuple(_node_from(node) for node in cost["nodes"])
            edges = tuple(EdgeOverflow.from_fields(edge) for edge in cost.get("edges", ()))
            regions.append(_timed(RegionCost(**{**cost, "nodes": nodes, "edges": edges})))
        return Report(tuple(regions))

    def as_dict(self) -> dict[str, Any]:
        """Return totals, and each region with its nodes; shared keys count once."""
        return {
            "look_ups": sum(r.look_ups for r in self.regions),
            "max_lookup_bits": max((r.max_lookup_bits for r in self.regions), default=0),
            "complexity": _total(r.complexity for r in self.regions),
            "key_bytes": _total(r.key_bytes for r in self.regions if r.has_own_keys),
            "regions": [asdict(r) for r in self.regions],
        }

    def to_json(self) -> str:
        """Return `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        blocks = []
        for region in self.regions:
            header = (
                "module path", "function", "look-ups", "bits", "of", "cost", "error", "overflow",
                "source",
            )  # fmt: skip
            rows = [
                (
                    n.module_path,
                    n.title,
                    f"{n.look_ups:,}",
                    str(n.input_bits),
                    str(n.accumulator_bits),
                    f"{100 * n.share:.1f} %",
                    "" if n.error_share is None else f"{100 * n.error_share:.1f} %",
                    "" if n.overflow is None else n.overflow.text(),
                    n.source,
                )
                for n in region.nodes
            ]
            widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
            right = {2, 3, 4, 5, 6, 7}
            table = [
                "  ".join(
                    c.rjust(w) if i in right else c.ljust(w)
                    for i, (c, w) in enumerate(zip(row, widths, strict=True))
                ).rstrip()
                for row in [header, *rows]
            ]
            told = [] if region.predicted_error is None else [_error(region.predicted_error)]
            if (said := region.overflow_line()) is not None:
                told.append(said)
            blocks.append("\n".join([region.line(), *[f"  {line}" for line in [*table, *told]]]))
        return "\n\n".join(blocks)


def report_on(
    programs: Sequence[tuple[Program, CircuitFacts | None]],
    tokens: Sequence[int | None] | None = None,
) -> Report:
    """Make the report of integer programs, and of their circuits where compiled.

    Args:
        programs: each with what its circuit costs, if it is compiled.
        tokens: the length of each, where one region has several.
    """
    lengths = tokens or [None] * len(programs)
    return Report(tuple(_region(*p, n) for p, n in zip(programs, lengths, strict=True)))


def _region(program: Program, facts: CircuitFacts | None, tokens: int | None) -> RegionCost:
    look_ups = program.calls(LOOKUP)
    readings: dict[str, list[fx.Node]] = {}
    for n in look_ups:
        readings.setdefault(str(n.meta.get("reading_of", n.name)), []).append(n)
    counts = {n: math.prod(d.shape_of(n)) for n in look_ups}
    bits = {n: Lookup.of(n).bits for n in look_ups}
    p_error = program.options.chosen_p_error
    noise = NoiseLevel.of(program)
    rounded = [Round.of(n).bits for n in program.results if d.is_call(n, ROUND)]
    result_bits = max(rounded, default=0)
    # Where no parameters are known to be exact enough, those that are the most exact.
    known = cost_table().log_norms[-1]
    norms = {b: min(noise.at(b, p_error, result_bits), known) for b in sorted(set(bits.values()))}
    costs = {n: counts[n] * lookup_cost(b, p_error, norms[b]) for n, b in bits.items()}
    variances = {n: float(n.meta["error_variance"]) for n in look_ups if "error_variance" in n.meta}
    # Every result is said what rounding adds to all of them together.
    rounding = max((float(n.meta.get("error_variance", 0)) for n in program.results), default=0.0)
    variance = sum(variances.values()) + rounding
    total = sum(costs.values())
    nodes = []
    for name, all_of_it in readings.items():
        n = next(m for m in all_of_it if m.name == name)
        source: ValueType = d.input_node(n).meta["type"]
        nodes.append(
            NodeCost(
                n.name,
                str(n.meta.get("function", "look-up")),
                str(n.meta.get("module_path", "")),
                str(n.meta.get("source", "")),
                sum(counts[m] for m in all_of_it),
                bits[n],
                source.bits,
                sum(costs[m] for m in all_of_it) / total,
                sum(variances.get(m, 0.0) for m in all_of_it) / (variance or 1.0)
                if n in variances
                else None,
                overflow_of(n),
                sum(m.meta.get("function") != _ZERO for m in all_of_it),
            )
        )
    nodes.sort(key=lambda c: -c.share)
    edges = edges_of(program)
    sizes = [key_size(b, p_error, norm) for b, norm in norms.items()]
    base = RegionCost(
        name=program.name,
        look_ups=sum(counts.values()),
        max_lookup_bits=max(bits.values(), default=0),
        p_error=p_error,
        nodes=tuple(nodes),
        predicted_complexity=total,
        predicted_error=math.sqrt(variance) if variances else None,
        rounding_share=rounding / (variance or 1.0) if variances else None,
        predicted_key_bytes=sum(size.key_bytes for size in sizes),
        predicted_memory_bytes=run_bytes(program, sizes),
        tokens=tokens,
        edges=edges,
        overflow_error=total_error([n.overflow for n in nodes] + [e.overflow for e in edges]),
    )
    if facts is None:
        return _timed(base)
    compiled = replace(
        base,
        look_ups=facts.look_ups,
        p_error=facts.p_error,
        complexity=facts.complexity,
        key_bytes=facts.key_bytes,
        input_bytes=facts.input_bytes,
        output_bytes=facts.output_bytes,
        compile_seconds=facts.compile_seconds,
        has_own_keys=facts.has_own_keys,
    )
    return _timed(compiled)


def _node_from(fields: Mapping[str, Any]) -> NodeCost:
    overflow = fields.get("overflow")
    known = None if overflow is None else Overflow(**overflow)
    return NodeCost(**{**fields, "overflow": known})


def _timed(cost: RegionCost) -> RegionCost:
    """Add the seconds that this machine needs."""
    rates = machine_rates()
    complexity = cost.predicted_complexity if cost.complexity is None else cost.complexity
    key_bytes = cost.predicted_key_bytes if cost.key_bytes is None else cost.key_bytes
    keygen = rates.key_bytes_per_second
    return replace(
        cost,
        estimated_seconds=None if complexity is None else complexity / rates.complexity_per_second,
        estimated_keygen_seconds=(
            None if keygen is None or key_bytes is None else key_bytes / keygen
        ),
    )


def _total(values: Any) -> Any:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _error(error: float) -> str:
    what = "error of look-ups and rounded results"
    return f"{what} about {100 * error:.2g} % of the results' deviation"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return "1 s"
    return f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"

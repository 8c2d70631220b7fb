"""Predicted overflow of parts of the shipped GPT-2, beside what other texts do.

    python benchmarks/overflow.py [--calibrations 4]

Each part is lowered for several calibration texts that the model writes, and run with the noise of
look-ups on 512 texts of another seed. Shares are of all values that look-ups read. The error of
results, in parts of their deviation, is found by running again with the same noise, where every
wrapped answer is replaced by the function's own.
"""

from __future__ import annotations

import argparse
import json
import math
from statistics import fmean

import torch
from measure import fresh_inputs, region_of, shipped_gpt2
from torch import Tensor, fx

import fhe_fx
from fhe_fx.inspection.twin import Twins, twins_of
from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.views import Lookup
from fhe_fx.quant.lookup_noise import LookupNoise
from fhe_fx.report import RegionCost, report_on
from fhe_fx.report.machine import machine_name
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.ranges import wraps

TOKENS, TEXTS = 6, 512
PARTS: tuple[tuple[str, list[int] | None], ...] = (
    ("h.0.attn", [0]), ("h.0.attn", None), ("h.0.mlp", None), ("h.0", None)
)  # fmt: skip


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibrations", type=int, default=4)
    seeds = range(10, 10 + parser.parse_args().calibrations)
    print(json.dumps({"machine": machine_name(), "texts": TEXTS, "tokens": TOKENS}))
    for target, heads in PARTS:
        found = [measured(target, heads, seed) for seed in seeds]
        means = {key: float(f"{fmean(row[key] for row in found):.3g}") for key in found[0]}
        each = [round(row["observed_error"], 3) for row in found]
        row = {"part": target, "heads": heads, **means, "observed_errors": each}
        print(json.dumps(row), flush=True)


def measured(target: str, heads: list[int] | None, seed: int) -> dict[str, float]:
    """Return shares and errors of one calibration, predicted and observed."""
    encrypted = fhe_fx.encrypt_submodule(
        shipped_gpt2(), target, heads=heads, max_tokens=TOKENS,
        options=fhe_fx.Options(n_bits=4, seed=seed),
    )  # fmt: skip
    twins = twins_of(region_of(encrypted))
    inputs = fresh_inputs(encrypted, TEXTS, TOKENS)
    cost = report_on([(twins.integers, None)]).regions[0]
    wrapped, repaired = _run(twins, inputs, False), _run(twins, inputs, True)
    exact = twins.exact.results[0]
    difference = (wrapped.results - repaired.results) * twins.integers.results[0].meta["type"].scale
    deviation = float(twins.exact.observed[exact.name].double().std())
    return {
        **_predicted(cost),
        "observed": wrapped.outside / wrapped.total,
        "observed_error": float(difference.square().mean().sqrt()) / deviation,
    }


def _predicted(cost: RegionCost) -> dict[str, float]:
    known = [(n.look_ups, n.overflow) for n in cost.nodes if n.overflow is not None]
    expected = sum(n * o.probability for n, o in known)
    errors = [o.result_error or 0.0 for _, o in known]
    return {"predicted": expected / cost.look_ups, "predicted_error": math.hypot(*errors)}


def _run(twins: Twins, inputs: Tensor, repairs: bool) -> _Run:
    codec = Codec.of(twins.integers)
    encoded = [[torch.from_numpy(q) for q in codec.encode([x])] for x in inputs]
    run = _Run(twins, repairs)
    with torch.no_grad():
        run.results = run.run(*[torch.stack(port) for port in zip(*encoded, strict=True)])[0]
    return run


class _Run(BatchInterpreter):
    """Runs integers with noise, and counts what wraps."""

    results: Tensor

    def __init__(self, twins: Twins, repairs: bool) -> None:
        super().__init__(twins.integers.module)
        self.twins, self.repairs = twins, repairs
        self.maps = {n.name: n for n in twins.exact.maps()}
        self.noise = LookupNoise.of(twins.integers.options.chosen_p_error)
        self.outside = self.total = 0

    def run_node(self, n: fx.Node) -> object:
        """Disturb what a look-up reads."""
        if not d.is_call(n, LOOKUP):
            return super().run_node(n)
        view = Lookup.of(n)
        x = self.env[view.x]
        if n.name not in self.twins.counterpart:  # an encrypted zero: one answer in every slot
            return LOOKUP(x, view.tables, view.which, view.bits, view.lsbs)
        noisy = self.noise.disturb(x, view.bits, view.lsbs)
        answer = LOOKUP(noisy, view.tables, view.which, view.bits, view.lsbs)
        is_outside = wraps(view, noisy)
        self.outside += int(is_outside.sum())
        self.total += is_outside.numel()
        return (
            torch.where(is_outside, self._function(n, view, x), answer) if self.repairs else answer
        )

    def _function(self, n: fx.Node, view: Lookup, x: Tensor) -> Tensor:
        read, answered = view.x.meta["type"], n.meta["type"]
        exact = self.maps[self.twins.counterpart[n.name]]
        real = d.map_of(exact)((x * read.scale + read.offset).float()).double().nan_to_num()
        whole: Tensor = ((real - answered.offset) / answered.scale).round()
        return whole.clamp(answered.low, answered.high).long()


if __name__ == "__main__":
    main()

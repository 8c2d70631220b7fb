"""Where the time of `fhe-fx report` goes: one attention of GPT-2's size, stage by stage.

    python benchmarks/stages.py             # a table: seconds by the clock, and of the processor
    python benchmarks/stages.py --json

Does what `fhe-fx report random:gpt2 --submodule h.0.attn --tokens 8` does, in the same order, and
looks at the clock in between. Nothing is read from the cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MODEL, PART, TOKENS = "random:gpt2", "h.0.attn", 8
SHOWN = 6
"""Passes that the table shows one by one: those that take longest."""
Seconds = tuple[float, float]
"""By the clock, and of the processor."""


@dataclass
class Watch:
    """Notes, for each stage, seconds of the clock and of the processor."""

    stages: dict[str, Seconds] = field(default_factory=dict)
    last: Seconds = (0.0, 0.0)

    def __post_init__(self) -> None:
        """Begin."""
        self.last = self._now()

    def note(self, stage: str) -> None:
        """Say what has been done since the last note."""
        wall, used = now = self._now()
        before = self.stages.get(stage, (0.0, 0.0))
        self.stages[stage] = (before[0] + wall - self.last[0], before[1] + used - self.last[1])
        self.last = now

    @staticmethod
    def _now() -> Seconds:
        return time.perf_counter(), time.process_time()


def measured() -> dict[str, Any]:
    """Make the report; return its seconds by stage."""
    watch = Watch()
    import torch

    import fhe_fx
    from fhe_fx.cli.command import few_collections
    from fhe_fx.export.models import load_model
    from fhe_fx.passes import Pipeline, default_pipeline
    from fhe_fx.passes.base import PassRecord
    from fhe_fx.quant.calibration import sample_from_model

    few_collections()
    passes: list[str] = []

    class Timed(Pipeline):
        """Notes the seconds of each pass."""

        def run(self, program: Any, **settings: Any) -> list[PassRecord]:
            watch.note("capture")

            def note(record: PassRecord) -> None:
                passes.append(record.name)
                watch.note(record.name)

            return super().run(program, **settings, on_pass=note)

    watch.note("imports")
    module = load_model(MODEL).module
    assert module is not None
    watch.note("building the model")
    options = fhe_fx.Options()
    samples = [call.kwargs for call in sample_from_model(module, TOKENS, options)]
    watch.note("sampling calibration text")
    encrypted = fhe_fx.encrypt_submodule(
        module, PART, calibration=samples, passes=Timed(default_pipeline().passes)
    )
    watch.note("capture")
    fhe_fx.compile(encrypted, verbose=False)
    watch.note("Concrete")
    str(fhe_fx.report(encrypted))
    watch.note("report")
    few = sorted(passes, key=lambda name: -watch.stages[name][0])[:SHOWN]
    return {
        "look_ups": fhe_fx.report(encrypted).regions[0].look_ups,
        "threads": torch.get_num_threads(),
        "stages": _together(watch.stages, [name for name in passes if name not in few]),
    }


def _together(stages: dict[str, Seconds], names: Sequence[str]) -> dict[str, Seconds]:
    """Add up the short passes in a row of their own."""
    found: dict[str, Seconds] = {}
    for stage, (wall, used) in stages.items():
        row = "other passes" if stage in names else stage
        before = found.get(row, (0.0, 0.0))
        found[row] = (before[0] + wall, before[1] + used)
    return found


def table(row: dict[str, Any]) -> str:
    """Write what was measured as a table."""
    lines = ["| stage | seconds | CPU-seconds |", "|---|---|---|"]
    lines += [f"| {stage} | {w:.1f} | {used:.1f} |" for stage, (w, used) in row["stages"].items()]
    ahead = ("imports", "building the model", "sampling calibration text")
    rest = [s for stage, s in row["stages"].items() if stage not in ahead]
    for name, part in (("capture to report", rest), ("all", list(row["stages"].values()))):
        walls, used = zip(*part, strict=True)
        lines.append(f"| **{name}** | {sum(walls):.1f} | {sum(used):.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    row = measured()
    print(json.dumps(row) if given.json else table(row))


if __name__ == "__main__":
    main()

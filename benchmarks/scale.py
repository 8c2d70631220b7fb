"""How lowering grows with the model: one attention by stage, all twelve, and time per node.

    python benchmarks/scale.py --page docs/scale.md   # measures, and writes the page and its figure

The attentions are those of a GPT-2 of released size with random weights, each lowered from the
float model by a call of its own, as a user would. The graphs that grow are stacks of small blocks,
each encrypted whole; a point is a process of its own. Seconds are of the processor: other work on
the machine hardly changes them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import stages as stages_of
import torch
from torch import Tensor, nn
from torch.nn import functional

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.export.models import load_model
from fhe_fx.passes import Pipeline, default_pipeline
from fhe_fx.passes.base import PassRecord
from fhe_fx.report.machine import machine_name

MODEL, TOKENS = "random:gpt2", 8
DEPTHS = (1, 2, 4, 8, 16)
CHANNELS, HEADS, ROWS, SAMPLES = 8, 2, 4, 32
_BUSY = (
    "Where other processes keep the cores busy, PyTorch's threads wait for each other at every "
    "operator, and the same takes several times as long; with `OMP_NUM_THREADS=1` it takes little "
    "more than on an idle machine. Results may then differ in the last bit of a float."
)
SHOWN = 3
"""Passes that the figure draws one by one: those that take longest."""
Row = dict[str, Any]


def main() -> None:
    """Measure, print, and write the page if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="write it, with scale.png and scale.svg beside")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(attentions() if given.row == "attentions" else stack(int(given.row))))
        return
    by_stage = _run(Path(__file__).with_name("stages.py"), "--json")
    whole, *points = [_apart(row) for row in ("attentions", *map(str, DEPTHS))]
    text = page(by_stage, whole, points)
    print(text)
    if given.page:
        draw(points, given.page.parent / "scale")
        given.page.write_text(text)


def _apart(row: str) -> Row:
    return _run(Path(__file__), "--row", row)


def _run(script: Path, *words: str) -> Row:
    command = [sys.executable, "-W", "ignore", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    print(script.name, *words, found, file=sys.stderr, flush=True)
    return found


def attentions() -> Row:
    """Lower each attention of the model by a call of its own."""
    module = load_model(MODEL).module
    assert module is not None
    words: Any = module.config
    generator = torch.Generator().manual_seed(0)
    calibration = [
        torch.randint(words.vocab_size, (1, TOKENS), generator=generator) for _ in range(48)
    ]
    start, look_ups = time.process_time(), 0
    for number in range(words.n_layer):
        path = f"transformer.h.{number}.attn"
        encrypted = fhe_fx.encrypt_submodule(module, path, calibration=calibration)
        look_ups += fhe_fx.report(encrypted).regions[0].look_ups
    return {
        "parts": words.n_layer,
        "look_ups": look_ups,
        "seconds": time.process_time() - start,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


class Block(nn.Module):
    """Norm, causal attention, residual, norm, MLP, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.read, self.write = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(2 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block, [1, ROWS, CHANNELS] to the same."""
        q, k, v = (
            part.view(1, ROWS, HEADS, -1).transpose(1, 2)
            for part in self.read(self.first(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.write(mixed.transpose(1, 2).reshape(1, ROWS, CHANNELS))
        y: Tensor = x + self.down(functional.gelu(self.up(self.second(x))))
        return y


def stack(depth: int) -> Row:
    """Lower a stack of blocks whole; return nodes and seconds of each pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*(Block() for _ in range(depth))))
    calibration = list(torch.randn(SAMPLES, 1, ROWS, CHANNELS))
    seconds: dict[str, float] = {}
    last = time.process_time()

    class Timed(Pipeline):
        """Adds up the processor's seconds of each pass."""

        def run(self, program: Any, **settings: Any) -> list[PassRecord]:
            nonlocal last
            last = time.process_time()

            def note(record: PassRecord) -> None:
                nonlocal last
                now = time.process_time()
                seconds[record.name] = seconds.get(record.name, 0.0) + now - last
                last = now

            return super().run(program, **settings, on_pass=note)

    begun = time.process_time()
    encrypted = fhe_fx.encrypt_submodule(
        model, "0", calibration=calibration, passes=Timed(default_pipeline().passes)
    )
    (part,) = encrypted_modules(encrypted)
    return {
        "blocks": depth,
        "nodes": len(part.region.program.graph.nodes),
        "look_ups": fhe_fx.report(encrypted).regions[0].look_ups,
        "seconds": time.process_time() - begun,
        "passes": seconds,
    }


# The page -------------------------------------------------------------------------------------


def page(by_stage: Row, whole: Row, points: list[Row]) -> str:
    """Write what was measured."""
    threads = "one thread" if by_stage["threads"] == 1 else f"{by_stage['threads']} threads"
    stages = (
        f"`fhe-fx report {stages_of.MODEL} --submodule {stages_of.PART} --tokens "
        f"{stages_of.TOKENS}` without its cache, stage by stage ({by_stage['look_ups']:,} "
        f"look-ups, {threads} of PyTorch; `python benchmarks/stages.py`):"
    )
    lowered = (
        f"All {whole['parts']} attentions of `{MODEL}`, {TOKENS} tokens, lowered one after the "
        f"other from the float model: {whole['look_ups']:,} look-ups, {whole['seconds']:.0f} "
        f"seconds of one core, {whole['gigabytes']:.1f} GB at most."
    )
    stacks = (
        f"Stacks of small blocks ({CHANNELS} channels, {HEADS} heads, {ROWS} rows), each "
        "encrypted whole, so that the graph alone grows:"
    )
    lines = [
        "<!-- Written by `python benchmarks/scale.py --page docs/scale.md`. -->",
        "",
        "# How lowering grows",
        "",
        "## One attention",
        "",
        stages,
        "",
        stages_of.table(by_stage),
        "",
        _BUSY,
        "",
        "## Whole models",
        "",
        lowered,
        "",
        stacks,
        "",
        "| blocks | nodes of the integer graph | look-ups | CPU-seconds | ms a node |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {p['blocks']} | {p['nodes']:,} | {p['look_ups']:,} | {p['seconds']:.0f} | "
        f"{1e3 * p['seconds'] / p['nodes']:.0f} |"
        for p in points
    ]
    return "\n".join(
        [
            *lines,
            "",
            "![Milliseconds a node against nodes](scale.png)",
            "",
            f"`python benchmarks/scale.py`, {machine_name()}, with other work on the machine.",
            "",
        ]
    )


def draw(points: list[Row], stem: Path) -> None:
    """Draw milliseconds a node against nodes, of all passes and of the slowest, PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    nodes = [p["nodes"] for p in points]
    largest = points[-1]["passes"]
    slowest = sorted(largest, key=lambda name: -largest[name])[:SHOWN]
    settings: Any = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "fhe_fx"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(6.3, 3.2), layout="constrained")
        axes = figure.add_subplot()
        series = {"capture and all passes": [p["seconds"] for p in points]}
        series |= {name: [p["passes"][name] for p in points] for name in slowest}
        for (name, seconds), marker in zip(series.items(), "osD^", strict=True):
            each = [1e3 * s / n for s, n in zip(seconds, nodes, strict=True)]
            axes.plot(nodes, each, marker=marker, ms=4, lw=1.2, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(nodes, [f"{n:,}" for n in nodes])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("nodes of the integer graph")
        axes.set_ylabel("CPU-milliseconds a node")
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(stem.with_suffix(".png"), dpi=200)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()

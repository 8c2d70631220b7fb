"""`fhe-fx passes`, `graph` and `diff`: what lowers a graph, and what becomes of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fhe_fx.cli.command import app
from fhe_fx.cli.lowering import DUMP, lowered, pipeline_of
from fhe_fx.cli.options import (
    AsJson,
    Calibration,
    ClearInputs,
    Heads,
    MaxCost,
    MaxError,
    NBits,
    Passes,
    PError,
    Rules,
    Seed,
    Submodules,
    TargetAgreement,
    Tokens,
    budget_of,
    check_places,
)
from fhe_fx.cli.talk import print_json, print_text, progress, say, size_of
from fhe_fx.errors import OptionsError

__all__ = ["diff", "graph", "passes"]


@app.command()
def passes(
    pipeline: Annotated[
        str | None, typer.Argument(help="As --passes takes it; without it, the default pipeline.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List a pipeline in order, with the law of each pass, and check that it can run."""
    chosen = pipeline_of(pipeline)
    chosen.check()
    rows = [
        {
            "name": p.name,
            "law": p.law(),
            "requires": sorted(p.requires),
            "gives": sorted(p.gives),
            "breaks": sorted(p.breaks),
        }
        for p in chosen
    ]
    if as_json:
        print_json({"passes": rows})
        return
    for number, row in enumerate(rows, 1):
        print_text(f"{number:2}  {row['name']}\n    {row['law']}")
        for key in ("requires", "gives", "breaks"):
            if row[key]:
                print_text(f"    {key} {', '.join(row[key])}")


@app.command()
def graph(
    source: Annotated[str, typer.Argument(help="What export or FHE_FX_DUMP wrote, or a MODEL.")],
    html: Annotated[Path | None, typer.Option(help="A page to write: all steps, folded.")] = None,
    svg: Annotated[Path | None, typer.Option(help="A picture to write of the last step.")] = None,
    level: Annotated[str, typer.Option(help="Of the picture: modules, lines or nodes.")] = "nodes",
    submodule: Submodules = None,
    n_bits: NBits = 4,
    tokens: Tokens = None,
    heads: Heads = None,
    clear_input: ClearInputs = None,
    calibration: Calibration = None,
    p_error: PError = None,
    max_error: MaxError = None,
    max_cost: MaxCost = None,
    target_agreement: TargetAgreement = None,
    rule: Rules = None,
    seed: Seed = 0,
    passes: Passes = None,
) -> None:
    """Draw the graph of an encrypted part, before and after each pass."""
    from fhe_fx.export.artifact import read_drawn
    from fhe_fx.export.manifest import MANIFEST
    from fhe_fx.report.page import LEVELS, read_snapshots, to_page, to_svg

    budget = budget_of(p_error, max_error, max_cost, target_agreement, rule)
    if html is None and svg is None:
        raise OptionsError("Give what to write: --html out.html, --svg out.svg, or both.")
    if level not in LEVELS:
        raise OptionsError(f"--level {level!r} is not one of {', '.join(LEVELS)}.")
    check_places(html=html, svg=svg)
    if submodule is None and (Path(source) / MANIFEST).is_file():
        snapshots = [read_drawn(source)]
    elif submodule is None:
        snapshots = read_snapshots(Path(source))
    else:
        with progress("loading and lowering the model"), _dumping() as dump:
            lengths = (tokens,) if tokens else None
            lowered(
                source, submodule, n_bits, lengths, heads, calibration, budget, seed, passes,
                is_one=True, clear_inputs=clear_input,
            )  # fmt: skip
            snapshots = read_snapshots(dump)
    if html is not None:
        html.write_text(to_page(snapshots), encoding="utf-8")
        say(f"{html}: {len(snapshots)} steps, {size_of(html.stat().st_size)}")
    if svg is not None:
        svg.write_text(to_svg(snapshots[-1], level), encoding="utf-8")
        say(f"{svg}: {size_of(svg.stat().st_size)}")


@contextmanager
def _dumping() -> Iterator[Path]:
    """Let lowerings be dumped, to where FHE_FX_DUMP says or to a place that is removed again."""
    with tempfile.TemporaryDirectory(prefix="fhe_fx-") as directory:
        held = os.environ.get(DUMP)
        os.environ[DUMP] = held or directory
        try:
            yield Path(os.environ[DUMP])
        finally:
            if held is None:
                del os.environ[DUMP]


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A directory that FHE_FX_DUMP wrote.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Compare two compilations node by node; the exit code is 1 if they differ."""
    from fhe_fx.report.difference import compare_snapshots
    from fhe_fx.report.page import read_snapshots

    found = compare_snapshots(read_snapshots(first)[-1], read_snapshots(second)[-1])
    print_text(str(found))
    if found.changes:
        raise typer.Exit(1)

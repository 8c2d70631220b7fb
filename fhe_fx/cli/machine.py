"""`fhe-fx cache` and `doctor`: what is kept on disk, and what this machine is."""

from __future__ import annotations

import os
from datetime import datetime
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fhe_fx.cli.command import app
from fhe_fx.cli.lowering import CACHE, kept_cache
from fhe_fx.cli.options import AsJson
from fhe_fx.cli.talk import print_json, print_text, progress, say, size_of

__all__ = ["cache", "doctor"]


class _CacheAction(str, Enum):
    show, path, clear = "show", "path", "clear"


@app.command()
def cache(
    action: Annotated[_CacheAction, typer.Argument(help="What to do.")] = _CacheAction.show,
    as_json: AsJson = False,
) -> None:
    """Show what lowering keeps on disk, print where, or remove it.

    FHE_FX_CACHE names the directory, or says off; FHE_FX_CACHE_GB bounds it.
    """
    kept = kept_cache()
    if kept is None:
        say(f"Nothing is kept: {CACHE}={os.environ[CACHE]}.")
        return
    if action is _CacheAction.path:
        print_text(str(kept.directory))
        return
    entries = kept.entries()
    if action is _CacheAction.clear:
        say(f"removed {len(entries)} entries, {size_of(kept.clear())}, of {kept.directory}")
        return
    held = sum(entry.bytes for entry in entries)
    if as_json:
        rows = [{"what": e.what, "bytes": e.bytes, "used": e.used} for e in entries]
        directory = str(kept.directory)
        bound = kept.most_bytes
        print_json({"directory": directory, "bytes": held, "bound": bound, "entries": rows})
        return
    print_text(f"{kept.directory}: {size_of(held)} of {size_of(kept.most_bytes)}")
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        print_text(f"  {used}  {size_of(entry.bytes):>8}  {entry.what}")


def _plugins() -> list[str]:
    """Load every plugin, and list those that work and those that do not."""
    from fhe_fx import plugins
    from fhe_fx.backends import backend_names
    from fhe_fx.passes import registered
    from fhe_fx.passes.lowerings.registry import load_lowerings

    registered()
    load_lowerings()
    backend_names()
    working = [f"{p}: {p.name} of {p.group}" for p in plugins.loaded()]
    return working + [f"{f.plugin}: {f.plugin.name}, left out" for f in plugins.faults()]


@app.command()
def doctor(
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Do not run look-ups to measure their rate.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, what this machine is, and how fast it runs look-ups."""
    from fhe_fx.report.machine import machine_facts, store_rate

    facts = machine_facts() | {"plugins": _plugins()}
    if not no_measure:
        with progress("running 128 look-ups of 6 bits, encrypted"):
            from fhe_fx.backends.concrete.benchmark import measure_look_ups

            found = measure_look_ups()
        facts |= {
            "rate": found.rate,
            "rate_is_measured": True,
            "measured_look_ups": found.look_ups,
            "measured_bits": found.bits,
            "measured_seconds": found.seconds,
            "keygen_seconds": found.keygen_seconds,
            "key_bytes_per_second": found.key_bytes_per_second,
            "rate_file": str(store_rate(found.rate, found.key_bytes_per_second)),
        }
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            shown = "\n".join(value) or "none"
        table.add_row(Text(key.replace("_", " ")), Text(shown))
    Console(highlight=False).print(table)

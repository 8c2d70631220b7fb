"""Measures what encrypted parts cost and how far off they are: one command for everything.

    python benchmarks/bench.py                        # make bench
    python benchmarks/bench.py --tokens 6,8 --execute # fewer lengths; run heads with keys
    python benchmarks/bench.py --draw                 # tables and plots of what is kept

Writes bench.json, bench.md and plots (PNG, SVG) to build/bench. Each row is a process of its own
and is kept when it is done, so a run that was stopped goes on where it was; a row is measured again
when the package has changed. Look-ups and complexity are exact and the same on every machine.
Beyond `--most-look-ups` nothing is compiled: look-ups are exact then too, the complexity is
predicted and marked, and noise is not simulated. What takes longer than `--seconds` is left out,
and the table says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import parts
from measure import (
    Row,
    cost_row,
    fresh_inputs,
    peak_gigabytes,
    random_gpt2,
    region_error,
    region_of,
)
from tables import markdown

import fhe_fx
from fhe_fx.capture.digest import digest_of_code
from fhe_fx.report.machine import machine_name

OUT = Path(__file__).parents[1] / "build" / "bench"
HEAD, ATTENTION = "one head", "12 heads"
HELD_OUT, SIMULATED = 32, 4
N_BITS = 4


def main() -> None:
    """Measure what is missing, then write tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="6,8,16,32", help="lengths of head and attention")
    parser.add_argument("--by-hand", default="6,8", help="lengths at which a head is naive besides")
    parser.add_argument("--most-look-ups", type=int, default=100_000, help="that are compiled")
    parser.add_argument("--seconds", type=float, default=3600, help="that a row may take")
    parser.add_argument("--execute", action="store_true", help="run 6-token heads with keys")
    parser.add_argument("--skip-parts", action="store_true", help="leave the shipped GPT-2 out")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measured(json.loads(given.row))))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    store = given.out / "rows.jsonl"
    for key in [] if given.draw else wanted(given):
        if not any(key.items() <= row.items() for row in read(store)):
            found = attempt(key, given.seconds)
            with store.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), file=sys.stderr, flush=True)
    write(given.out, read(store))


def wanted(given: argparse.Namespace) -> list[Row]:
    """Return the key of every row, cheap ones first."""
    lengths = [int(n) for n in given.tokens.split(",")]
    by_hand = [int(n) for n in given.by_hand.split(",") if n]
    code = digest_of_code()[:12]
    growth = [
        {
            "kind": "growth", "part": part, "tokens": n, "most": given.most_look_ups,
            "by_hand": part == HEAD and n in by_hand,
            "execute": given.execute and part == HEAD and n == min(lengths), "code": code,
        }
        for n in lengths
        for part in (HEAD, ATTENTION)
    ]  # fmt: skip
    shipped = [
        {"kind": "part", "part": part, "n_bits": n_bits, "code": code}
        for part, n_bits in parts.PARTS
    ]
    return growth + ([] if given.skip_parts else shipped)


def read(store: Path) -> list[Row]:
    """Return the rows that are kept."""
    return [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []


def attempt(key: Row, seconds: float) -> Row:
    """Measure a row in a process of its own; if there is none, say why."""
    command = [sys.executable, "-W", "ignore", __file__, "--row", json.dumps(key)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {**key, "left_out": f"not done in {seconds:.0f} s"}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"ended with {error.returncode}"]
        return {**key, "left_out": lines[-1][:200]}
    found: Row = json.loads(run.stdout.splitlines()[-1])
    return {**key, **found, "machine": machine_name()}


# Rows -----------------------------------------------------------------------------------------


def measured(key: Row) -> Row:
    """Return one row."""
    if key["kind"] == "part":
        return dict(parts.measured(key["part"], key["n_bits"]))
    return grown(key)


def grown(key: Row) -> Row:
    """Return cost and error of attention of GPT-2's size with random weights, at some length."""
    tokens, heads = key["tokens"], [0] if key["part"] == HEAD else None
    model = random_gpt2()
    start = time.perf_counter()
    encrypted = fhe_fx.encrypt_submodule(
        model, "h.0.attn", n_bits=N_BITS, heads=heads, max_tokens=tokens
    )
    row: Row = {"n_bits": N_BITS, "lower_seconds": round(time.perf_counter() - start, 1)}
    row["lower_gigabytes"] = peak_gigabytes()
    region = region_of(encrypted)
    predicted = fhe_fx.report(encrypted).regions[0]
    is_compiled = predicted.look_ups <= key["most"]
    cost = fhe_fx.compile(encrypted, verbose=False).regions[0] if is_compiled else predicted
    row |= cost_row(cost) | {"peak_gigabytes": peak_gigabytes()}
    inputs = list(fresh_inputs(encrypted, HELD_OUT, tokens))
    row["clear_error"] = region_error(region, inputs, "clear")
    if is_compiled:
        row["simulate_error"] = region_error(region, inputs[:SIMULATED], "simulate")
    if key["execute"]:
        start = time.perf_counter()
        row["execute_error"] = region_error(region, inputs[:1], "execute")
        row["execute_seconds"] = round(time.perf_counter() - start, 1)
    if key["by_hand"]:
        import naive

        head = naive.Head.of_gpt2(model.transformer.h[0].attn, 0)
        samples, held_out = (
            [x.reshape(tokens, -1).numpy() for x in these]
            for these in ([s[0] for s in region.captured.samples], inputs)
        )
        row["naive"] = naive.measured(
            head, samples, held_out, N_BITS,
            p_error=None, is_executed=key["execute"], simulated=SIMULATED,
        )  # fmt: skip
    return row


# What is written ------------------------------------------------------------------------------


def write(out: Path, rows: list[Row]) -> None:
    """Write the newest of each row as JSON, as a table (printed too) and as plots."""
    newest = {(r["kind"], r["part"], r.get("tokens", 0), r.get("n_bits")): r for r in rows}
    kept = [r for r in newest.values() if r["code"] == rows[-1]["code"]]
    (out / "bench.json").write_text(json.dumps(kept, indent=1) + "\n")
    text = markdown(kept)
    (out / "bench.md").write_text(text)
    print(text)
    from plots import draw

    for path in draw(kept, out):
        print(path)


if __name__ == "__main__":
    main()

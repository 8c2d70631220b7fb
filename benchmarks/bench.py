"""Measures what encrypted parts cost and how far off they are: one command for everything.

    python benchmarks/bench.py                        # make bench
    python benchmarks/bench.py --tokens 6,8 --execute # fewer lengths; run heads with keys
    python benchmarks/bench.py --draw                 # tables and plots of what is kept

Writes bench.json, bench.md and plots (PNG, SVG) to build/bench, with the law by which costs grow
with the length. It says first how long the missing rows will take, by what they took before. Each
row is a process of its own and is kept when it is done, so a run that was stopped goes on where it
was; a row is measured again when the package has changed, and tried again when it was left out.
Look-ups and complexity are exact and the same on every machine.
Beyond `--most-look-ups` nothing is compiled: look-ups are exact then too, the complexity is
predicted and marked, and noise is not simulated. What takes longer than `--seconds` is left out,
and the table says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import parts
from growth import laws
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
SECONDS = Path(__file__).with_name("seconds.jsonl")
"""How long rows took somewhere, for the first estimate."""
PLACE = ("kind", "part", "n_bits", "tokens")
"""What tells rows apart, but for the code and how they are measured."""
HEAD, ATTENTION = "one head", "12 heads"
HELD_OUT, SIMULATED = 32, 4
N_BITS = 4


def main() -> None:
    """Measure what is missing, then write tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="6,8,16,32", help="lengths of head and attention")
    parser.add_argument("--head-by-hand", default="6,8,16,32", help="lengths of the naive head")
    parser.add_argument("--by-hand", default="6,8", help="lengths of the naive attention")
    parser.add_argument("--most-look-ups", type=int, default=1_000_000, help="that are compiled")
    parser.add_argument("--seconds", type=float, default=3600, help="that a row may take")
    parser.add_argument("--keep-seconds", action="store_true", help="for estimates of later runs")
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
    if not given.draw:
        measure(wanted(given), store, given.seconds)
    rows = newest(read(store))
    if not rows:
        parser.error(f"nothing is kept in {store} yet")
    if given.keep_seconds:
        keep_seconds(rows)
    write(given.out, rows)


def measure(keys: Sequence[Row], store: Path, seconds: float) -> None:
    """Measure the rows that are not kept yet, or were left out, and keep each when it is done."""
    kept = [row for row in read(store) if "left_out" not in row]
    missing = [key for key in keys if not any(key.items() <= row.items() for row in kept)]
    known = [*read(SECONDS), *kept]
    print(f"{len(keys)} rows, {len(keys) - len(missing)} kept: {estimate(missing, known)}")
    for number, key in enumerate(missing, 1):
        name = f"{key['part']}, n_bits={key['n_bits']}, {key['tokens']} tokens"
        print(f"{number} of {len(missing)}: {name}, {estimate([key], known)}", flush=True)
        found = attempt(key, seconds)
        known += [] if "left_out" in found else [found]
        with store.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"  {found.get('left_out') or 'done'}, {found['seconds']:.0f} s", flush=True)


def estimate(keys: Sequence[Row], known: Sequence[Row]) -> str:
    """Return how long rows will take, in words, by what the same took elsewhere or before."""
    found = [expected(key, known) for key in keys]
    seconds, unknown = sum(s for s in found if s is not None), found.count(None)
    text = f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s"
    if unknown == len(keys):
        return "how long is not known" if keys else "nothing to measure"
    return text + (f", and {unknown} of which it is not known" if unknown else "")


def expected(key: Row, known: Sequence[Row]) -> float | None:
    """Return the seconds that a row took last, if it ever was measured."""
    same = [row for row in known if all(row[name] == key[name] for name in PLACE)]
    return float(same[-1]["seconds"]) if same else None


def keep_seconds(rows: Sequence[Row]) -> None:
    """Write how long each row took to the file that estimates start from."""
    names = (*PLACE, "seconds", "machine")
    done = [json.dumps({n: row[n] for n in names}) for row in rows if "left_out" not in row]
    SECONDS.write_text("\n".join(done) + "\n")


def wanted(given: argparse.Namespace) -> list[Row]:
    """Return the key of every row, cheap ones first."""
    lengths = numbers(given.tokens)
    by_hand = {HEAD: numbers(given.head_by_hand), ATTENTION: numbers(given.by_hand)}
    code = digest_of_code()[:12] + digest_of_circuits()[:4]
    growth = [
        {
            "kind": "growth", "part": part, "n_bits": N_BITS, "tokens": n,
            "most": given.most_look_ups, "by_hand": n in by_hand[part],
            "execute": given.execute and part == HEAD and n == min(lengths), "code": code,
        }
        for n in lengths
        for part in (HEAD, ATTENTION)
    ]  # fmt: skip
    shipped = [
        {"kind": "part", "part": part, "n_bits": n_bits, "tokens": parts.TOKENS, "code": code}
        for part, n_bits in parts.PARTS
    ]
    return growth + ([] if given.skip_parts else shipped)


def numbers(text: str) -> list[int]:
    """Return the numbers between commas."""
    return [int(n) for n in text.split(",") if n]


def digest_of_circuits() -> str:
    """Return a hash of what the benchmarks measure besides the package."""
    measured = ("measure.py", "naive.py", "parts.py")
    texts = [Path(__file__).with_name(name).read_bytes() for name in measured]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def read(store: Path) -> list[Row]:
    """Return the rows that a file holds, JSON objects a line."""
    return [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []


def newest(rows: Sequence[Row]) -> list[Row]:
    """Return the last row of each kind and length, of those that the newest package gave."""
    found = {tuple(r[n] for n in PLACE): r for r in rows if r["code"] == rows[-1]["code"]}
    return list(found.values())


def attempt(key: Row, seconds: float) -> Row:
    """Measure a row in a process of its own; if there is none, say why."""
    command = [sys.executable, "-W", "ignore", __file__, "--row", json.dumps(key)]
    start = time.perf_counter()
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds)
        found: Row = json.loads(run.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"left_out": f"not done in {seconds:.0f} s"}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        killed = error.returncode < 0 or not lines  # nothing was said of it, as without memory
        found = {"left_out": f"ended with {error.returncode}" if killed else lines[-1][:200]}
    taken = round(time.perf_counter() - start, 1)
    return {**key, **found, "seconds": taken, "machine": machine_name()}


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
        model, "h.0.attn", n_bits=key["n_bits"], heads=heads, max_tokens=tokens
    )
    row: Row = {"lower_seconds": round(time.perf_counter() - start, 1)}
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

        attention = model.transformer.h[0].attn
        layer = (
            naive.Attention.of_gpt2(attention)
            if heads is None
            else naive.Head.of_gpt2(attention, 0)
        )
        samples, held_out = (
            [x.reshape(tokens, -1).numpy() for x in these]
            for these in ([s[0] for s in region.captured.samples], inputs)
        )
        row["naive"] = naive.measured(
            key["part"], layer, samples, held_out, key["n_bits"],
            p_error=None, is_executed=key["execute"], simulated=SIMULATED,
        )  # fmt: skip
    return row


# What is written ------------------------------------------------------------------------------


def write(out: Path, rows: Sequence[Row]) -> None:
    """Write rows and laws as JSON, as tables (printed too) and as plots."""
    data = {"rows": rows, "laws": laws(rows)}
    (out / "bench.json").write_text(json.dumps(data, indent=1) + "\n")
    text = markdown(rows)
    (out / "bench.md").write_text(text)
    print(text)
    from plots import draw

    for path in draw(rows, out):
        print(path)


if __name__ == "__main__":
    main()

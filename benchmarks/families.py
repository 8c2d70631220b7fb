"""Lowers and compiles parts of many families of models, and writes the table of what they cost.

    python benchmarks/families.py                              # tiny models, every part
    python benchmarks/families.py --size real --part attention # random weights of released sizes
    python benchmarks/families.py --size real --no-compile     # complexity is predicted
    python benchmarks/families.py --page docs/families.md      # both tables, of what was measured

Each row is a process of its own and is kept when it is done, so a run that was stopped goes on
where it was; a row is measured again when the package has changed. Look-ups and complexity are
exact and do not depend on the machine; seconds do. What a row may take is counted in seconds of the
processor, so that other work on the machine stops none; of one that is stopped while its circuit is
compiled, the predicted complexity is kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fhe_fx.capture.digest import digest_of_code
from fhe_fx.report.machine import machine_name

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the zoo is the tests'
from tests.families.zoo import FAMILIES, PARTS  # noqa: E402

STORE = ROOT / "build" / "families.jsonl"
CALIBRATION, HELD_OUT = 48, 8
Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("tiny", "real"), default="tiny")
    parser.add_argument("--part", choices=PARTS, action="append", help="all without it")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="all without it")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--n-bits", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=CALIBRATION, help="inputs of it")
    parser.add_argument("--seconds", type=int, default=900, help="of the processor, for a row")
    parser.add_argument("--gigabytes", type=float, default=8, help="of memory, for a row")
    parser.add_argument(
        "--no-compile", action="store_true", help="predict complexities instead of compiling"
    )
    parser.add_argument("--store", type=Path, default=STORE, help="where rows are kept")
    parser.add_argument("--page", type=Path, help="write the tables of what is kept, and stop")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        _limit(given.seconds, given.gigabytes)
        rows = measure(json.loads(given.row), given.calibration, is_compiled=not given.no_compile)
        for found in rows:
            print(json.dumps(found), flush=True)
    elif given.page:
        given.page.write_text(page(read(given.store)))
    else:
        for key in wanted(given):
            found = attempt(key, given)
            given.store.parent.mkdir(parents=True, exist_ok=True)
            with given.store.open("a") as file:
                file.write(json.dumps({**key, **found}) + "\n")
            print(json.dumps({**key, **found}), flush=True)


# Measuring ------------------------------------------------------------------------------------


def wanted(given: argparse.Namespace) -> list[Row]:
    """Return the rows that were asked for and are not kept yet."""
    keys = [
        {
            "size": given.size, "family": name, "part": part, "tokens": given.tokens,
            "n_bits": given.n_bits, "code": digest_of_code()[:12],
        }
        for name in given.family or FAMILIES
        for part in given.part or PARTS
        if part in FAMILIES[name].parts and (given.size == "tiny" or FAMILIES[name].config)
    ]  # fmt: skip
    kept = read(given.store)
    return [k for k in keys if not any(k.items() <= row.items() for row in kept)]


def read(store: Path) -> list[Row]:
    """Return the rows that are kept."""
    return [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []


def attempt(key: Row, given: argparse.Namespace) -> Row:
    """Measure a row in a process of its own; what it dies of is part of the result."""
    command = [
        sys.executable, "-W", "ignore", __file__, "--row", json.dumps(key),
        "--seconds", str(given.seconds), "--gigabytes", str(given.gigabytes),
        "--calibration", str(given.calibration),
        *(["--no-compile"] if given.no_compile else []),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    if lines:  # at least lowered
        found: Row = json.loads(lines[-1])
        return found
    if run.returncode == -signal.SIGXCPU:
        reason = f"not done after {given.seconds} s of the processor"
    elif _is_of_memory(run.stderr):
        reason = f"needs more than {given.gigabytes:g} GB of memory"
    else:
        reason = (run.stderr.strip().splitlines() or [f"ended with {run.returncode}"])[-1]
    return {"stopped": reason, "machine": machine_name()}


def _is_of_memory(message: str) -> bool:
    return "can't allocate memory" in message or "MemoryError" in message


def _limit(seconds: int, gigabytes: float) -> None:
    """Let the system end this process beyond some seconds of the processor, and refuse memory."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9), most))


def measure(key: Row, calibration: int, *, is_compiled: bool) -> Iterator[Row]:
    """Lower and compile one part; give its cost as predicted and as compiled, or why not.

    Raises:
        FheFxError: if memory did not suffice; that is no refusal.
    """
    import torch

    import fhe_fx
    from fhe_fx.api import encrypted_modules

    family = FAMILIES[key["family"]]
    model = family.build(is_tiny=key["size"] == "tiny")
    inputs = family.inputs(model, calibration + HELD_OUT, key["tokens"])
    found: Row = {"machine": machine_name(), "rows": family.rows(model, key["tokens"])}
    start = time.perf_counter()
    try:
        (encrypted,) = family.encrypt(
            model, [key["part"]], inputs[:calibration], n_bits=key["n_bits"]
        )
        found["lower_seconds"] = round(time.perf_counter() - start, 1)
        (part,) = encrypted_modules(encrypted)
        samples: list[list[torch.Tensor]] = []
        part.register_forward_pre_hook(
            lambda m, args, kwargs: samples.extend(m.samples_of(*args, **kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            for x in inputs[calibration:]:
                encrypted(x)
        exact = torch.stack([part.region.run_float(s)[0] for s in samples])
        clear = torch.stack([r[0] for r in part.region.run_many(samples, "clear")])
        found["error"] = float((clear - exact).norm() / exact.norm())
        cost = fhe_fx.report(encrypted).regions[0]
        found |= {"look_ups": cost.look_ups, "bits": cost.max_lookup_bits}
        yield {**found, "predicted_complexity": cost.predicted_complexity}
        if is_compiled:
            cost = fhe_fx.compile(encrypted, verbose=False).regions[0]
            yield {**found, "complexity": cost.complexity}
    except fhe_fx.FheFxError as error:
        if _is_of_memory(str(error)):
            raise
        yield {**found, "refused": f"{type(error).__name__}: {error}"}


# The page -------------------------------------------------------------------------------------


INTRODUCTION = """<!-- Written by `python benchmarks/families.py --page docs/families.md`. -->

# Families of models

Parts of the first block of many classes of transformers, with random weights: lowered, compiled,
and compared with float. Nothing in the package knows a family. The zoo is `tests/families/zoo.py`;
what is refused lacks an operator, which a lowering would add.

A token is a row of the input: of a ViT a patch, of the plain networks a sample. The error is the
root mean square difference of the part's first result from float, in parts of its root mean
square, in integers (mode `clear`), on eight inputs that calibration had not seen. Weights and
words are random, so errors say whether a lowering is right, and not how a trained model behaves:
for that see [accuracy](accuracy.md). Calibration is on 48 inputs; where two values are multiplied,
what lies outside the ranges of so few makes much of the error: on 256 (`--calibration 256`)
LLaMA's MLP of released size errs by 0.128 for 0.258. Look-ups and complexity are exact and the
same everywhere.

Of a released size a part is listed where it was measured; one that took more of the processor or of
memory than allowed is called stopped. Where the circuit was not compiled, the complexity is
predicted and called about; look-ups are exact all the same. The command goes on where it was.
Where the feed-forward layer is no submodule, its part lies between two of them.

The encoder block of torch.nn (`nn.LayerNorm`, `nn.MultiheadAttention`, MLP) is what torchvision's
ViT is made of. torchvision itself is not tried: beside a PyTorch without CUDA its wheel on PyPI
does not load.
"""


EARLIER = """Rows with a star are of an earlier compiler than the one that wrote this page; the
command measures them again.
"""


def page(rows: list[Row]) -> str:
    """Write the tables, the newest of each row."""
    newest = {(r["size"], r["family"], r["part"], r["tokens"], r["n_bits"]): r for r in rows}
    machines = sorted({r["machine"] for r in newest.values()})
    lines = [INTRODUCTION]
    if any(r["code"] != digest_of_code()[:12] for r in newest.values()):
        lines += [EARLIER]
    for size, title in (("real", "Released sizes"), ("tiny", "Tiny models")):
        chosen = [r for key, r in sorted(newest.items(), key=_order) if key[0] == size]
        for tokens, n_bits in dict.fromkeys((r["tokens"], r["n_bits"]) for r in chosen):
            some = [r for r in chosen if (r["tokens"], r["n_bits"]) == (tokens, n_bits)]
            lines += [f"## {title}, {tokens} tokens, `n_bits={n_bits}`", ""]
            of_size = " --size real" if size == "real" else ""
            command = f"python benchmarks/families.py{of_size} --tokens {tokens}"
            lines += [f"`{command} --n-bits {n_bits}`", "", *_table(some), ""]
    lines += [f"Measured on {'; '.join(machines)}.", ""]
    return "\n".join(lines)


def _order(item: tuple[tuple[Any, ...], Row]) -> tuple[int, int, int]:
    _, family, part, tokens, _ = item[0]
    return tokens, list(FAMILIES).index(family), PARTS.index(part)


def _table(rows: list[Row]) -> list[str]:
    lines = [
        "| family | part | look-ups | per token | complexity | bits | error | seconds to lower |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: dict[str, int] = {}
    for r in rows:
        star = "" if r["code"] == digest_of_code()[:12] else " *"
        head = f"| {r['family']}{star} | {r['part']} |"
        reason = r.get("refused") or r.get("stopped")
        if reason:
            number = notes.setdefault(reason, len(notes) + 1)
            counted = f"{r['look_ups']:,}" if "look_ups" in r else ""
            error = f"{r['error']:.3f}" if "error" in r else ""
            what = "refused" if "refused" in r else "stopped"
            lines.append(f"{head} {counted} | | {what} ({number}) | | {error} | |")
            continue
        lines.append(
            f"{head} {r['look_ups']:,} | {r['look_ups'] / r['rows']:,.0f} | "
            f"{_complexity(r)} | {r['bits']} | {r['error']:.3f} | {r['lower_seconds']:.0f} |"
        )
    for reason, number in notes.items():
        lines += ["", f"({number})", "", "```text", reason, "```"]
    return lines


def _complexity(row: Row) -> str:
    if "complexity" in row:
        return f"{row['complexity']:.1e}"
    return f"about {row['predicted_complexity']:.1e}"


if __name__ == "__main__":
    main()

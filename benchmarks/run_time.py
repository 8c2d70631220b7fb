"""Measures where the time of an encrypted run goes: its look-ups, and all the rest.

    python benchmarks/run_time.py                  # one head of GPT-2's size at 6 tokens
    python benchmarks/run_time.py --tokens 4 --rounds 5

In one process, with one set of keys: the head is encrypted, run and decrypted; look-ups of the same
parameters are run alone, few and many, whose difference is the time of one; and the head's inputs
are only added up, whose time is that of expanding ciphertexts from their seeds. Of several rounds,
one after the other, the least counts. What the look-ups do not explain is the share outside them.

Shares are those of wall time on this machine's cores when it does nothing else, and hold on a busy
one: they are reckoned from processor seconds, of which look-ups share theirs out among the cores
and all the rest is taken to run on one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from concrete import fhe  # noqa: TID251 -- it is Concrete's own circuits that are timed
from measure import random_gpt2, region_of

import fhe_fx
from fhe_fx.backends.concrete.folders import owned_folders
from fhe_fx.report.machine import machine_name

FEW, MANY = 8, 136
Time = tuple[float, float]
BITS, LSBS = 8, 6


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--n-bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if os.environ.get("KMP_BLOCKTIME") != "0":  # threads that wait must not count as work
        os.environ["KMP_BLOCKTIME"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    print(json.dumps(measured(given.tokens, given.n_bits, given.rounds), indent=1))


def measured(tokens: int, n_bits: int, rounds: int) -> dict[str, Any]:
    """Time a head, and what it consists of."""
    model = random_gpt2()
    encrypted, peak_lower = peak_memory(
        lambda: fhe_fx.encrypt_submodule(
            model, "h.0.attn", n_bits=n_bits, heads=[0], max_tokens=tokens
        )
    )
    region = region_of(encrypted)
    compiled, peak_compile = peak_memory(region.circuit)
    circuit: Any = compiled._circuit
    facts = compiled.facts
    keygen = timed(circuit.keygen)
    sample = region.captured.samples[0]
    inputs = region.codec.encode(sample)
    fresh = sum(x.size for x in inputs)
    few, many = (like(circuit, facts.p_error, n) for n in (FEW, MANY))
    added = like(circuit, facts.p_error, fresh, is_sum=True)
    first = timed(lambda: run(few))  # makes the seeded keys whole, once

    found: list[dict[str, Time]] = []
    peak = 0.0
    for _ in range(rounds):
        row = {
            "few": timed(lambda: run(few)),
            "many": timed(lambda: run(many)),
            "added": timed(lambda: run(added)),
        }
        steps, used = peak_memory(lambda: one_run(region, circuit, sample))
        peak = max(peak, used)
        found.append(row | steps)
    wall, cpu = ({k: min(row[k][i] for row in found) for k in found[0]} for i in (0, 1))

    each = (cpu["many"] - cpu["few"]) / (MANY - FEW)
    look_ups = facts.look_ups * each
    parts = {
        "encrypting inputs": cpu["encrypt"],
        "expanding inputs": cpu["added"] - each,
        "Python, encoding, decrypting": cpu["encode"] + cpu["decrypt"],
    }
    parts["affine maps and what else"] = cpu["run"] - parts["expanding inputs"] - look_ups
    cores = len(os.sched_getaffinity(0))
    total = sum(parts.values()) + look_ups / cores
    server = cpu["run"] - look_ups
    return {
        "machine": machine_name(),
        "tokens": tokens, "n_bits": n_bits, "rounds": rounds,
        "look_ups": facts.look_ups, "fresh_ciphertexts": fresh, "complexity": facts.complexity,
        "wall_seconds": {k: round(v, 3) for k, v in wall.items()},
        "processor_seconds": {k: round(v, 3) for k, v in cpu.items()} | {
            "keygen": round(keygen[1], 2), "keys made whole, once": round(first[1] - cpu["few"], 2)
        },
        "look_up_processor_milliseconds": round(1000 * each, 2),
        "complexity_per_processor_second": float(f"{facts.complexity / look_ups:.3g}"),
        "share_outside_look_ups": round(1 - look_ups / cores / total, 3),
        "shares": {name: round(value / total, 3) for name, value in parts.items()},
        "server_share_outside_look_ups": round(server / (server + look_ups / cores), 3),
        "peak_gigabytes": {"lower": peak_lower, "compile": peak_compile, "run": peak},
    }  # fmt: skip


def like(circuit: Any, p_error: float, n: int, *, is_sum: bool = False) -> tuple[Any, Any]:
    """Compile `n` look-ups, or one of a sum of `n` inputs, with a circuit's parameters and keys.

    Returns:
        The circuit and its encrypted inputs.
    """
    half = 1 << (BITS + LSBS - 1)

    def function(x: Any) -> Any:
        rounded = fhe.round_bit_pattern(
            np.sum(x) if is_sum else x,
            lsbs_to_remove=LSBS, exactness=fhe.Exactness.APPROXIMATE, overflow_protection=False,
        )  # fmt: skip
        return fhe.univariate(lambda v: v >> LSBS)(rounded)

    low, high = np.zeros((2, n), np.int64)
    low[slice(1) if is_sum else slice(n)] = -half
    high[slice(1) if is_sum else slice(n)] = half - 1
    keyset = circuit.client.specs.program_info.get_keyset_info()
    with owned_folders() as keep:
        made = fhe.Compiler(function, {"x": "encrypted"}).compile(
            [low, high], p_error=p_error, compress_input_ciphertexts=True,
            compress_evaluation_keys=True, keyset_restriction=keyset.get_restriction(),
        )  # fmt: skip
        keep(made.server)
    assert made.client.specs.program_info.get_keyset_info() == keyset
    made.keys = circuit.keys
    return made, made.encrypt(np.zeros(n, np.int64))


def run(pair: tuple[Any, Any]) -> None:
    """Run a circuit on its inputs."""
    pair[0].run(pair[1])


def one_run(region: Any, circuit: Any, sample: Any) -> dict[str, Time]:
    """Return the time of each step of one run."""
    times: dict[str, Time] = {}

    def step(name: str, work: Callable[[], Any]) -> tuple[Any, ...]:
        held: list[Any] = []
        times[name] = timed(lambda: held.append(work()))
        (value,) = held
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)

    inputs = step("encode", lambda: region.codec.encode(sample))
    encrypted = step("encrypt", lambda: circuit.encrypt(*inputs))
    results = step("run", lambda: circuit.run(*encrypted))
    step("decrypt", lambda: circuit.decrypt(*results))
    return times


def timed(work: Callable[[], object]) -> Time:
    """Return the seconds that something takes, of the wall's clock and of all processors."""
    start, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - processor


def peak_memory(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what something returns, and the most memory this process held meanwhile, in GB."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    value = work()
    (line,) = (t for t in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in t)
    return value, math.ceil(int(line.split()[1]) / 1e4) / 100


if __name__ == "__main__":
    main()

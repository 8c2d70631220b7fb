"""Measures where the time of an encrypted run goes: its look-ups, and all the rest.

    python benchmarks/run_time.py                  # one head of GPT-2's size at 6 tokens
    python benchmarks/run_time.py --tokens 4 --rounds 5

In one process, with one set of keys: the head is encrypted, run and decrypted; look-ups of the same
parameters are run alone, few and many, whose difference is the time of one; and the head's inputs
are only added up, whose time is that of expanding ciphertexts from their seeds. Of several rounds,
one after the other, the fastest counts. What the look-ups do not explain is the share outside them.
Seconds depend on the machine, and on what else it does; shares hardly do.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
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
BITS, LSBS = 8, 6


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--n-bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
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
    keygen, _ = peak_memory(lambda: seconds(circuit.keygen))
    sample = region.captured.samples[0]
    inputs = region.codec.encode(sample)
    alone = {n: like(circuit, compiled.facts.p_error, n) for n in (FEW, MANY)}
    added = like(circuit, compiled.facts.p_error, sum(x.size for x in inputs), is_sum=True)

    first_run = seconds(lambda: run(alone[FEW]))  # makes the seeded keys whole, once
    found: list[dict[str, float]] = []
    peak = 0.0
    for _ in range(rounds):
        row = {"few": seconds(lambda: run(alone[FEW])), "many": seconds(lambda: run(alone[MANY]))}
        row["added"] = seconds(lambda: run(added))
        steps, used = peak_memory(lambda: one_run(region, circuit, sample))
        peak = max(peak, used)
        found.append(row | steps)
    best = {name: min(row[name] for row in found) for name in found[0]}

    profile = cProfile.Profile()
    profile.runcall(compiled.execute, inputs)
    in_python = sum(s.inlinetime for s in profile.getstats() if not isinstance(s.code, str))
    facts = compiled.facts
    each = (best["many"] - best["few"]) / (MANY - FEW)
    total = sum(best[step] for step in ("encode", "encrypt", "run", "decrypt"))
    parts = {
        "encrypting inputs": best["encrypt"],
        "expanding inputs": best["added"] - best["few"] + (FEW - 1) * each,
        "Python, encoding, decrypting": best["encode"] + best["decrypt"] + in_python,
    }
    outside = total - facts.look_ups * each
    parts["affine maps and what else"] = outside - sum(parts.values())
    return {
        "machine": machine_name(),
        "tokens": tokens, "n_bits": n_bits, "rounds": rounds,
        "look_ups": facts.look_ups, "fresh_ciphertexts": sum(x.size for x in inputs),
        "complexity": facts.complexity,
        "seconds": {k: round(v, 3) for k, v in best.items()} | {
            "keygen": round(keygen, 2), "keys made whole, once": round(first_run - best["few"], 2),
            "python": round(in_python, 4),
        },
        "look_up_milliseconds": round(1000 * each, 2),
        "complexity_per_second": float(f"{facts.complexity / (facts.look_ups * each):.3g}"),
        "share_outside_look_ups": round(outside / total, 3),
        "shares": {name: round(value / total, 3) for name, value in parts.items()},
        "server_share_outside_look_ups": round(1 - facts.look_ups * each / best["run"], 3),
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


def one_run(region: Any, circuit: Any, sample: Any) -> dict[str, float]:
    """Return the seconds of each step of one run."""
    times, last = {}, time.perf_counter()

    def lap(name: str, value: Any) -> Any:
        nonlocal last
        now = time.perf_counter()
        times[name], last = now - last, now
        return value

    inputs = lap("encode", region.codec.encode(sample))
    encrypted = lap("encrypt", circuit.encrypt(*inputs))
    many = encrypted if isinstance(encrypted, tuple) else (encrypted,)
    results = lap("run", circuit.run(*many))
    lap("decrypt", circuit.decrypt(*(results if isinstance(results, tuple) else (results,))))
    return times


def seconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_memory(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what something returns, and the most memory this process held meanwhile, in GB."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    value = work()
    (line,) = (t for t in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in t)
    return value, math.ceil(int(line.split()[1]) / 1e4) / 100


if __name__ == "__main__":
    main()

"""Asks Concrete's optimizer what a look-up costs, by the bits that it reads and by `p_error`.

    python benchmarks/lookup_cost.py            # prints the table of docs/cost.md
    python benchmarks/lookup_cost.py --write    # besides, writes the one that the compiler uses

Each circuit is a look-up of inputs, weighted sums of up to 64 of its answers, and a look-up of the
sums, both behind approximate roundings of six bits or more, as the passes emit them. Its
complexity divided by its look-ups is the cost of one. The 2-norm of the weights says how much noise
the sums have. Only parameters are searched, so that the figures are the same on every machine for
one version of Concrete; that takes half an hour. Sizes of keys and ciphertexts stand in the same
table, and the noise of an answer, by the formula of its parameters.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from concrete import fhe  # noqa: TID251 -- it is Concrete's optimizer that is measured

from fhe_fx.backends.concrete.folders import owned_folders
from fhe_fx.quant import lookup_cost
from fhe_fx.report.machine import installed_version

BITS = range(3, 13)
P_ERRORS = (
    0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.85, 0.9
)  # fmt: skip
"""Not 0.75: from nine bits on it uses up what a polynomial size can do, and whether the optimizer
gives sums parameters of their own there depends on the rest of the circuit."""
SHOWN_BITS = (4, 5, 6, 7, 8, 9)
SHOWN_NORM = 3
SHOWN = (0.8, 0.6, 0.4, 0.2, 0.1, 0.01)
LOG_NORMS = (
    *(1, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7, 9, 10, 10.5, 11, 11.5, 12, 13, 13.5, 14, 14.5, 15, 15.5),
    *(16, 16.5, 17, 17.5, 18),
)
REMOVED_BITS, RESULT_BITS, SUMS, MOST_TERMS = 6, 8, 8, 64


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {lookup_cost.TABLE.name}")
    is_writing = parser.parse_args().write
    version = f"concrete-python {installed_version('concrete-python')}"
    if is_writing:
        write(lookup_cost.TABLE, version)
        price = lookup_cost.lookup_cost
    else:
        price = cost  # type: ignore[assignment]
    print(f"{version}, complexity of one look-up\n")
    print("| bits read |", " | ".join(f"p_error {p:g}" for p in SHOWN), "|")
    print("|---|" + "---|" * len(SHOWN))
    for bits in SHOWN_BITS:
        row = (f"{price(bits, p, SHOWN_NORM):.1e}".replace("e+0", "e") for p in SHOWN)
        print(f"| {bits} |", " | ".join(row), "|")


def write(path: Path, version: str) -> None:
    """Measure and write the table: for each number of bits a row for each norm."""
    points = [[[measured(b, p, k) for p in P_ERRORS] for k in LOG_NORMS] for b in BITS]
    costs, keys, words, noise = np.moveaxis(np.array(points, dtype=np.float64), -1, 0)
    blocks: dict[str, list[list[Any]]] = {
        "complexity_by_bits": [[written(row) for row in block] for block in monotone(costs)],
        "key_bytes_by_bits": [[list(map(int, row)) for row in block] for block in keys],
        "words_by_bits": [[list(map(int, row)) for row in block] for block in words],
        "log_deviation_by_bits": [[[round(x, 2) for x in row] for row in block] for block in noise],
    }
    lines = [f'  "measured_on": {json.dumps(version)}']
    lines += [f'  "p_errors": {json.dumps(P_ERRORS)}', f'  "log_norms": {json.dumps(LOG_NORMS)}']
    for name, block in blocks.items():
        rows = [
            f'    "{bits}": [\n      ' + ",\n      ".join(map(json.dumps, row)) + "\n    ]"
            for bits, row in zip(BITS, block, strict=True)
        ]
        lines.append(f'  "{name}": {{\n' + ",\n".join(rows) + "\n  }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def written(costs: npt.NDArray[np.float64]) -> list[float | None]:
    """Round costs to four digits; None where no parameters exist."""
    return [None if np.isinf(c) else float(f"{c:.4g}") for c in costs]


def monotone(costs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Lower costs `[bits, norms, p_errors]` to those of parameters that were found for more.

    What serves more bits, a larger norm and a smaller `p_error` serves less, too.
    """
    for axis in (0, 1):
        costs = np.flip(np.minimum.accumulate(np.flip(costs, axis), axis), axis)
    return np.minimum.accumulate(costs, 2)


def cost(bits: int, p_error: float, log_norm: float) -> float:
    """Return the complexity of one look-up, infinite if no parameters exist.

    Args:
        bits: what it reads.
        p_error: how often it may err.
        log_norm: log2 of the 2-norm of the weights in the sums.
    """
    return measured(bits, p_error, log_norm)[0]


def measured(bits: int, p_error: float, log_norm: float) -> tuple[float, int, int, float]:
    """Return besides what its parameters take, and the noise of its answer.

    Returns:
        Complexity; bytes of the keys; words of a ciphertext; log2 of the deviation, in parts of the
        torus.
    """
    # Twice the terms for half a bit, so that the weight is a whole number.
    terms = round(min(4**log_norm, MOST_TERMS * 4 ** (log_norm % 1)))
    weight = round(2**log_norm / terms**0.5)
    # A table answers one at least, and the sum of all must not have more bits than are read.
    removed = max(REMOVED_BITS, (weight * terms).bit_length() + 1 - bits)
    half = 1 << (bits + removed - 1)

    def read(x: Any, divisor: int) -> Any:
        rounded = fhe.round_bit_pattern(
            x,
            lsbs_to_remove=removed,
            exactness=fhe.Exactness.APPROXIMATE,
            overflow_protection=False,
        )
        return fhe.univariate(lambda v: v // divisor)(rounded)

    def chain(x: Any) -> Any:
        sums = np.sum(read(x, weight * terms) * weight, axis=1)
        return read(sums, 1 << (bits + removed - RESULT_BITS))

    ends = [np.full((SUMS, terms), value) for value in (-half, half - 1)]
    try:
        with owned_folders():  # nothing is run: they may go at once
            circuit = fhe.Compiler(chain, {"x": "encrypted"}).compile(
                ends, p_error=p_error, compress_evaluation_keys=True
            )
            complexity = float(circuit.complexity) / (SUMS * terms + SUMS)
            return complexity, *sizes(circuit), log_deviation(circuit)
    except RuntimeError as error:
        if "NoParametersFound" not in str(error):
            raise
        return float("inf"), 0, 0, 0.0


def sizes(circuit: Any) -> tuple[int, int]:
    """Return bytes of the keys, and words of a ciphertext, of the parameters of most look-ups."""
    boot = usual(circuit.programmable_bootstrap_count_per_parameter)
    switch = usual(circuit.key_switch_count_per_parameter)
    short, long = boot.input_lwe_dimension(), boot.polynomial_size() * boot.glwe_dimension()
    bootstrap = short * (boot.glwe_dimension() + 1) ** 2 * boot.level() * boot.polynomial_size()
    key_switch = long * switch.level() * (short + 1)
    return 8 * int(bootstrap + key_switch), int(long) + 1


def log_deviation(circuit: Any) -> float:
    """Return log2 of the deviation of the noise of an answer, in parts of the torus.

    What a bootstrap adds by the noise of its key, by rounding to the levels of the decomposition,
    and by Fourier transforms in double precision (Bergerat et al. 2023, "Parameter optimization and
    larger precision for (T)FHE", section 3, for a binary key).
    """
    boot = usual(circuit.programmable_bootstrap_count_per_parameter)
    size, levels = int(boot.polynomial_size()), int(boot.level())
    short, long = int(boot.input_lwe_dimension()), size * int(boot.glwe_dimension())
    base, rows = 2.0 ** int(boot.base_log()), int(boot.glwe_dimension()) + 1
    key = variance_of_key(circuit, boot) * levels * rows * size * (base**2 + 2) / 12
    square = base ** (2 * levels)
    cut = (2.0**128 - square) / (24 * square) * (1 + long / 2)
    cut += long / 32 + (1 - long / 2) ** 2 / 16
    transform = 2.0 ** (22 - 2.577) * levels * base**2 * size**2 * rows
    return 0.5 * math.log2(short * (key + (cut + transform) / 2.0**128))


def variance_of_key(circuit: Any, boot: Any) -> float:
    """Return the variance with which a bootstrapping key is encrypted, in parts of the torus."""
    keys = json.loads(circuit.client.specs.serialize())["keyset"]["lweBootstrapKeys"]
    wanted = boot.polynomial_size(), boot.glwe_dimension(), boot.level(), boot.input_lwe_dimension()
    names = "polynomialSize", "glweDimension", "levelCount", "inputLweDimension"
    all_params = [k["params"] for k in keys]
    return next(float(p["variance"]) for p in all_params if tuple(p[n] for n in names) == wanted)


def usual(counts: dict[Any, int]) -> Any:
    """Return the parameters that most operations have."""
    return max(counts, key=lambda k: counts[k])


if __name__ == "__main__":
    main()

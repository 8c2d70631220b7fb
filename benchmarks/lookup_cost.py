"""Asks Concrete's optimizer what a look-up costs, by the bits that it reads and by `p_error`.

    python benchmarks/lookup_cost.py     # prints the table of docs/cost.md, in about a minute

Each circuit is a look-up of inputs, sums of sixteen of its answers, and a look-up of the sums,
both behind approximate roundings of six bits, as the passes emit them. Its complexity divided by
its look-ups is the cost of one. Only parameters are searched, so that the figures are the same on
every machine for one version of Concrete.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from concrete import fhe  # noqa: TID251 -- it is Concrete's optimizer that is measured

from fhe_fx.report.machine import installed_version

BITS = (4, 5, 6, 7, 8)
P_ERRORS = (0.4, 0.2, 0.1, 0.01, 1e-4)
REMOVED_BITS, SUMS, TERMS = 6, 4, 16


def main() -> None:
    """Print the table."""
    print(f"concrete-python {installed_version('concrete-python')}, complexity of one look-up\n")
    print("| bits read |", " | ".join(f"p_error {p:g}" for p in P_ERRORS), "|")
    print("|---|" + "---|" * len(P_ERRORS))
    for bits in BITS:
        costs = (cost(bits, p_error) for p_error in P_ERRORS)
        print(f"| {bits} |", " | ".join(f"{c:.1e}".replace("e+0", "e") for c in costs), "|")


def cost(bits: int, p_error: float) -> float:
    """Return the complexity of one look-up."""
    half = 1 << (bits + REMOVED_BITS - 1)

    def read(x: Any) -> Any:
        rounded = fhe.round_bit_pattern(
            x,
            lsbs_to_remove=REMOVED_BITS,
            exactness=fhe.Exactness.APPROXIMATE,
            overflow_protection=False,
        )
        return fhe.univariate(lambda v: v // TERMS)(rounded)

    def chain(x: Any) -> Any:
        return read(np.sum(read(x), axis=1))

    ends = [np.full((SUMS, TERMS), value) for value in (-half, half - 1)]
    circuit = fhe.Compiler(chain, {"x": "encrypted"}).compile(ends, p_error=p_error)
    return float(circuit.complexity) / (SUMS * TERMS + SUMS)


if __name__ == "__main__":
    main()

"""How much keys and ciphertexts will take, before anything is compiled.

Both follow from the parameters that the optimizer chooses, and those from how little noise a
look-up may have, as its cost does. So the table, which `python benchmarks/lookup_cost.py --keys`
asks of the optimizer, goes by the cost of one look-up.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program

__all__ = ["KEYS_TABLE", "KeySize", "key_sizes", "run_bytes"]

KEYS_TABLE = Path(__file__).with_name("key_sizes.json")
"""Where the table is kept."""


@dataclass(frozen=True)
class KeySize:
    """What parameters take."""

    cost: float
    """Complexity of one look-up with them."""
    key_bytes: int
    """Bootstrap and key-switching keys, as the server holds them."""
    words: int
    """64-bit words of one ciphertext."""


@functools.cache
def _table() -> tuple[KeySize, ...]:
    rows = json.loads(KEYS_TABLE.read_text(encoding="utf-8"))["rows"]
    return tuple(KeySize(*row) for row in rows)


def key_sizes(costs: Iterable[float]) -> tuple[KeySize, ...]:
    """Return what the parameters take with which one look-up costs nearest to each of `costs`.

    Args:
        costs: complexity of one look-up of each width (`quant.lookup_cost`). Those of which no
            parameters exist are left out.
    """
    finite = sorted(cost for cost in costs if math.isfinite(cost))
    return tuple(min(_table(), key=lambda size: abs(math.log(size.cost / cost))) for cost in finite)


def run_bytes(program: Program, sizes: Sequence[KeySize]) -> int:
    """Return what a run holds at most: ciphertexts, and each key as it is sent and as it is used.

    Args:
        program: in integers.
        sizes: of its parameters; the widest ciphertexts count for all.
    """
    words = max((size.words for size in sizes), default=0)
    keys = sum(size.key_bytes for size in sizes)
    return 8 * words * _most_alive(program) + 2 * keys


def _most_alive(program: Program) -> int:
    """Return how many ciphertexts there are at once, at most."""
    nodes = list(program.encrypted())
    position = {node: i for i, node in enumerate(nodes)}
    is_result = set(program.results)
    change = [0] * (len(nodes) + 1)
    for i, node in enumerate(nodes):
        last = max((position[user] for user in node.users if user in position), default=i)
        # Inputs are expanded before anything else, and results are kept to the end.
        change[0 if node.op == "placeholder" else i] += (count := math.prod(d.shape_of(node)))
        change[len(nodes) if node in is_result else last + 1] -= count
    return max(itertools.accumulate(change), default=0)

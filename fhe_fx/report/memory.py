"""What a run holds in memory, before anything is compiled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program
from fhe_fx.quant.lookup_cost import KeySize

__all__ = ["run_bytes"]


def run_bytes(program: Program, sizes: Sequence[KeySize]) -> int:
    """Return what a run holds at most: ciphertexts, and each key as it is sent and as it is used.

    Args:
        program: in integers.
        sizes: of the parameters of each width; the widest ciphertexts count for all.
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

"""The weights by which answers of look-ups are multiplied on the way to a result.

No look-up reads what they sum, so only the client's rounding asks how much noise they pass on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR
from fhe_fx.quant.noise_level import WholeWeights, behind_look_ups
from fhe_fx.quant.weight_rounding import expected_error, rows_of

if TYPE_CHECKING:
    from torch import fx

    from fhe_fx.ir.program import Program

__all__ = ["weighed_results", "weights_response"]


def weighed_results(program: Program) -> list[fx.Node]:
    """Return the clear-weight products of answers that no look-up, only results are made of."""
    behind = behind_look_ups(program)
    is_returned: dict[fx.Node, bool] = {}
    for node in reversed(list(program.encrypted())):
        users = [u for u in node.users if u.op != "output"]
        is_returned[node] = all(d.is_call(u, *d.AFFINE) and is_returned[u] for u in users)
    return [n for n in program.calls(LINEAR) if is_returned[n] and d.input_node(n) in behind]


def weights_response(program: Program, products: list[fx.Node]) -> float:
    """Return the variance that rounding weights to their usual bits adds to the results.

    Args:
        program: in float, with observed values.
        products: as `weighed_results` gives them.

    Returns:
        The mean square error of the results, in parts of their variance, if what is multiplied
        behind the products is one.
    """
    weights = WholeWeights(program)
    n_results = sum(math.prod(d.shape_of(n)) for n in program.results)
    variance = sum(float(program.observed[n.name].double().var()) for n in program.results)
    total = 0.0
    for node in products:
        x, weight = d.input_node(node), d.constant(d.input_node(node, 1))
        unit = weights.range_of(x)[..., :1, :]
        values = program.observed[x.name].double() / unit
        error = expected_error(rows_of(values - values.mean(0), weight))
        step = weights.range_of(node) * 2.0 ** -weights.doublings(node)
        rows = error.reshape(*error.shape, *(1,) * (step.dim() - error.dim()))
        total += float((rows * step.square()).sum())
    return total / max(1, n_results) / max(variance / len(program.results), 1e-24)

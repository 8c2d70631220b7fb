"""The weights by which answers of look-ups are multiplied.

Each bit of theirs doubles the noise that they pass on, to the next look-up or to a result that the
client rounds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LINEAR
from fhe_fx.quant.noise_level import WholeWeights, behind_look_ups
from fhe_fx.quant.sensitivity import sensitivities
from fhe_fx.quant.weight_rounding import expected_error, rows_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import fx

    from fhe_fx.ir.program import Program

__all__ = ["coarser_by", "weighed_answers", "weights_responses"]

_VALUES, _LEAST = 1 << 20, 8
"""Values of the largest sum by which the results are differentiated, about; samples, at least."""


def weighed_answers(program: Program) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the clear-weight products of answers.

    Returns:
        Those behind which a look-up reads, and those that only results are made of.
    """
    behind = behind_look_ups(program)
    is_returned: dict[fx.Node, bool] = {}
    for node in reversed(list(program.encrypted())):
        users = [u for u in node.users if u.op != "output"]
        is_returned[node] = all(d.is_call(u, *d.AFFINE) and is_returned[u] for u in users)
    products = [n for n in program.calls(LINEAR) if d.input_node(n) in behind]
    return (
        [n for n in products if not is_returned[n]],
        [n for n in products if is_returned[n]],
    )


def weights_responses(program: Program, products: Sequence[fx.Node]) -> dict[fx.Node, float]:
    """Return the variance that rounding weights to their usual bits adds to the results.

    Args:
        program: in float, with observed values.
        products: as `weighed_answers` gives them.

    Returns:
        For every product, the mean square error of the results, in parts of their variance.
    """
    if not products:
        return {}
    weights = WholeWeights(program)
    size = max(math.prod(d.shape_of(n)) for n in products)
    samples = program.samples[:: max(1, len(program.samples) // max(_LEAST, _VALUES // size))]
    gradients = sensitivities(program, samples, nodes=products)
    n_results = sum(math.prod(d.shape_of(n)) for n in program.results)
    found = {}
    for node in products:
        x, weight = d.input_node(node), d.constant(d.input_node(node, 1))
        unit = weights.range_of(x)[..., :1, :]
        values = program.observed[x.name].double() / unit
        error = expected_error(rows_of(values - values.mean(0), weight))
        step = weights.range_of(node) / weights.unit(node)
        rows = error.reshape(*error.shape, *(1,) * (step.dim() - error.dim()))
        moved = gradients[node.name].double().square().mean((0, 1))
        found[node] = float((rows * step.square() * moved).sum()) / n_results
    return found


def coarser_by(responses: Mapping[fx.Node, float], most: int) -> dict[fx.Node, int]:
    """Return by how many bits fewer each product's weights may have than those that err most.

    Where a result is the sum of several products, one that makes a small part of it needs as many
    bits fewer; it then errs as the one that errs most does, at most.

    Args:
        responses: as `weights_responses` gives them.
        most: by how many bits, at most.
    """
    greatest = max(responses.values(), default=0.0)
    return {
        n: min(most, math.floor(0.5 * math.log2(greatest / r))) if r > 0 else 0
        for n, r in responses.items()
    }

"""How much an error at one place of a float program changes its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fhe_fx.ir.batch import BatchInterpreter

if TYPE_CHECKING:
    from fhe_fx.ir.program import Program

__all__ = ["sensitivities"]


def sensitivities(
    program: Program,
    samples: Sequence[tuple[Tensor, ...]],
    draws: int = 2,
    nodes: Sequence[fx.Node] | None = None,
) -> dict[str, Tensor]:
    """Differentiate random combinations of the results by what each of some nodes computes.

    A combination weighs every element of every result by an independent standard normal number, in
    parts of the result's deviation. So for errors e of the nodes, the square of
    `(e * found).sum()` has the mean squared relative error of the results as expected value
    (Hutchinson's estimate), errors of several nodes that belong together included.

    Args:
        program: with observed values.
        samples: values of the inputs.
        draws: combinations for each sample.
        nodes: by which; the maps, if none are given.

    Returns:
        For every node, `[draws, n_samples, *shape]`, float32, by node name.
    """
    names = [n.name for n in (program.maps() if nodes is None else nodes)]
    if not names:
        return {}
    generator = torch.Generator().manual_seed(program.options.seed)
    sizes = [
        program.observed[n.name].double().std().clamp_min(1e-12).float() for n in program.results
    ]
    recorder = _Recorder(program.module, names)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.enable_grad():
        inputs = [x.detach().float().requires_grad_() for x in program.stacked(samples)]
        results = recorder.run(*inputs)
        answers = list(recorder.answers.values())
        for draw in range(draws):
            total = sum(
                (torch.randn(r.shape, generator=generator) * r).sum() / size
                for r, size in zip(results, sizes, strict=True)
            )
            gradients = torch.autograd.grad(
                total, answers, retain_graph=draw + 1 < draws, materialize_grads=True
            )
            for name, gradient in zip(recorder.answers, gradients, strict=True):
                found[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in found.items()}


class _Recorder(BatchInterpreter):
    """Runs a graph and keeps what some nodes compute, with its history."""

    def __init__(self, module: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__(module)
        self.names = frozenset(names)
        self.answers: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            if not value.requires_grad:  # a step: flat wherever it has a derivative
                value = value.detach().requires_grad_()
            self.answers[n.name] = value
        return value

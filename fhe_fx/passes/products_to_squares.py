"""Write a product of two encrypted tensors with squares: 2ab = (a+b)^2 - a^2 - b^2.

Exact to float rounding. One look-up per product, plus one per element of each operand: the squares
of the operands are taken before they are repeated, so all their products share them.

The operands are brought to comparable size first, and the squares are taken around the mean m of
the sum: ab = (a+b-m)^2/2 + (ma - a^2/2) + (mb - b^2/2) - m^2/2. Most sums then lie where the slope
of the square, by which the rounding of the sum is multiplied, is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import compact, elementwise
from fhe_fx.ir.ops import PUT_PAIRS, TABULATED, TAKE_PAIRS
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.quant.classes import Classes, find_classes

__all__ = ["ProductsToSquares"]

aten = torch.ops.aten
_MOVES = d.STRUCTURAL - {d.CAT, PUT_PAIRS, TAKE_PAIRS}


@register
@dataclass(frozen=True)
class ProductsToSquares(Pass):
    """Rewrite each `mul` of two encrypted tensors."""

    name: ClassVar[str] = "products-to-squares"
    requires: ClassVar[frozenset[str]] = frozenset({"calibrated", "no-matmul"})
    gives: ClassVar[frozenset[str]] = frozenset({"no-products"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    centres: bool = True
    """Whether squares are taken around the mean of the sums; else around zero."""

    def run(self, program: Program) -> bool:
        """Rewrite all products, with ranges observed before any of them changed."""
        nodes = program.calls(d.MUL)
        if not nodes:
            return False
        classes = find_classes(program)
        plans = [self._plan(program, classes, n) for n in nodes]
        written: dict[fx.Node, fx.Node] = {}  # a product may be an operand of a later one
        for node, plan in zip(nodes, plans, strict=True):
            written[node] = self._rewrite(program, node, plan, written)
            program.replace(node, written[node])
        return True

    def _plan(self, program: Program, classes: Classes, node: fx.Node) -> _Plan:
        left, right = (_operand(cast(fx.Node, a)) for a in node.args)
        a, b = (classes.of[o.root].reshape(-1)[o.elements] for o in (left, right))
        group_of = _connected(a, b, classes.n_classes)
        spread_a = _spread(program, classes, left.root)
        spread_b = _spread(program, classes, right.root)
        alpha, beta = _balance(a, b, group_of, spread_a, spread_b)
        values = program.observed
        u = (alpha[classes.of[left.root]] * values[left.root.name]).flatten(1)[:, left.elements] + (
            beta[classes.of[right.root]] * values[right.root.name]
        ).flatten(1)[:, right.elements]
        group = group_of[a]
        zeros = torch.zeros(classes.n_classes, dtype=torch.float64)
        counts = zeros.scatter_add(0, group.reshape(-1), torch.ones(group.numel()).double())
        means = zeros.scatter_add(0, group.reshape(-1), u.double().mean(0).reshape(-1))
        means = means / counts.clamp_min(1) if self.centres else zeros
        return _Plan(
            left,
            right,
            compact(alpha[classes.of[left.root]]),
            compact(beta[classes.of[right.root]]),
            compact(means[group]),
            compact(means[_first(group_of[a], left)]),
            compact(means[_first(group, right)]),
            compact(1.0 / (alpha[a] * beta[b])),
        )

    def _rewrite(
        self, program: Program, node: fx.Node, plan: _Plan, written: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        b = program.before(node, self)
        left, right = (written.get(o.root, o.root) for o in (plan.left, plan.right))
        a1, b1 = b.scale(left, plan.alpha), b.scale(right, plan.beta)
        u = b.add(plan.left.move(b, a1), plan.right.move(b, b1))
        square = b.map(u, _square_around(plan.mean), "square")
        own = [
            operand.move(b, b.map(x, _own_square(mean, d.is_map(root)), "square"))
            for operand, root, x, mean in (
                (plan.left, left, a1, plan.mean_left),
                (plan.right, right, b1, plan.mean_right),
            )
        ]
        total = b.shift(b.add(b.add(square, own[0]), own[1]), -0.5 * plan.mean.square())
        return b.scale(total, plan.factor)


@dataclass(frozen=True)
class _Operand:
    """One side of a product: the tensor before it was moved and repeated."""

    root: fx.Node
    moves: tuple[fx.Node, ...]
    elements: Tensor
    """Flat number of the root's element behind every element of the product."""

    def move(self, b: object, x: fx.Node) -> fx.Node:
        """Repeat the structural operators on x."""
        for move in self.moves:
            args = [x if i == 0 else a for i, a in enumerate(move.args)]
            x = b.call(move.target, *args)  # type: ignore[attr-defined]
        return x


@dataclass(frozen=True)
class _Plan:
    left: _Operand
    right: _Operand
    alpha: Tensor
    beta: Tensor
    mean: Tensor
    mean_left: Tensor
    mean_right: Tensor
    factor: Tensor


def _operand(node: fx.Node) -> _Operand:
    moves: list[fx.Node] = []
    best = (math.prod(d.shape_of(node)), 0)
    chain = [node]
    while d.is_call(chain[-1], *_MOVES):
        moves.append(chain[-1])
        chain.append(d.input_node(chain[-1]))
        best = min(best, (math.prod(d.shape_of(chain[-1])), -len(moves)))
    taken = moves[: -best[1]] if best[1] else []
    root = chain[len(taken)]
    numbers = torch.arange(math.prod(d.shape_of(root))).view(d.shape_of(root))
    for move in reversed(taken):
        numbers = d.evaluate(move, numbers)
    return _Operand(root, tuple(reversed(taken)), numbers)


def _connected(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Number the groups of classes that meet in products; indexed by class of the left side."""
    from scipy.sparse import coo_matrix  # slow to import
    from scipy.sparse.csgraph import connected_components

    pairs = torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)]), dim=1).numpy()
    ones = torch.ones(pairs.shape[1], dtype=torch.int8).numpy()
    graph = coo_matrix((ones, (pairs[0], pairs[1] + n)), shape=(2 * n, 2 * n))
    labels = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
    compact: Tensor = torch.unique(labels[:n], return_inverse=True)[1]
    return compact


def _spread(program: Program, classes: Classes, node: fx.Node) -> Tensor:
    """Return the standard deviation of each class of a node, never zero."""
    _, deviation = classes.moments(node, program.observed[node.name])
    low, high = classes.extremes(node, program.observed[node.name])
    floor = torch.maximum(high.abs(), low.abs()) * 1e-3 + 1e-12
    return torch.where(
        deviation.isfinite(), torch.maximum(deviation, floor), torch.ones(()).double()
    )


def _balance(
    a: Tensor, b: Tensor, group_of: Tensor, spread_a: Tensor, spread_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose the factor of each class so that both operands have the same spread.

    Where classes meet one to one, alpha * beta = 1, so that products of different channels can be
    summed as they are; where several meet several, rows with weights of their own, all of a side
    are taken as one. Where one class meets many, each of the many is brought to spread one.
    """
    pairs = torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)]), dim=1)
    group = group_of[pairs[0]]
    n_groups = int(group_of.max()) + 1
    sides = []
    for classes, spread in ((pairs[0], spread_a), (pairs[1], spread_b)):
        members = torch.unique(torch.stack([group, classes]), dim=1)
        count = torch.bincount(members[0], minlength=n_groups)
        square = torch.zeros(n_groups, dtype=torch.float64)
        square.scatter_add_(0, members[0], spread[members[1]].square())
        sides.append((count, (square / count.clamp_min(1)).sqrt()))
    (count_a, size_a), (count_b, size_b) = sides
    alike = ((count_a == 1) == (count_b == 1))[group]
    one_a, one_b, group = pairs[0][alike], pairs[1][alike], group[alike]
    ratio = (size_b / size_a)[group].sqrt()
    alpha, beta = 1.0 / spread_a, 1.0 / spread_b
    alpha[one_a], beta[one_b] = ratio, 1.0 / ratio
    return alpha, beta


def _first(group: Tensor, operand: _Operand) -> Tensor:
    """Return the group of each element of an operand's root."""
    size = math.prod(d.shape_of(operand.root))
    found = torch.zeros(size, dtype=torch.int64)
    found[operand.elements.reshape(-1)] = group.reshape(-1)
    return found.view(d.shape_of(operand.root))


def _square_around(mean: Tensor) -> fx.GraphModule:
    centre = mean.item() if mean.numel() == 1 else mean
    return elementwise(
        (aten.sub.Tensor, (centre,), {}),
        (aten.pow.Tensor_Scalar, (2,), {}),
        (aten.mul.Tensor, (0.5,), {}),
    )


def _own_square(mean: Tensor, is_table: bool) -> fx.GraphModule:
    """Return x -> m x - x^2 / 2, written as m^2 / 2 - (x - m)^2 / 2.

    An operand that a table returns enters the sum as that table holds it. Its square must be of the
    same value: the mean of x^2 over a slot is larger by the variance of x there, without bound
    where the table is steep.
    """
    centre = mean.item() if mean.numel() == 1 else mean
    half = 0.5 * mean.square()
    return elementwise(
        *([(TABULATED, (), {})] if is_table else []),
        (aten.sub.Tensor, (centre,), {}),
        (aten.pow.Tensor_Scalar, (2,), {}),
        (aten.mul.Tensor, (-0.5,), {}),
        (aten.add.Tensor, (half.item() if half.numel() == 1 else half,), {}),
    )

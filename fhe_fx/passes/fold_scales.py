"""Move constant factors to where they cost nothing: into weights, and next to functions.

Exact to float rounding. Left where it stands, a factor costs an integer multiplication, and with it
bits of the accumulator. Factors go up to the weights and functions that make a value; those that
cannot go down, to the weights and functions that read it, or to the client. A mean is left behind
as a sum: x - sum(x)/n becomes (n x - sum(x))/n, exact in integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import LINEAR, PUT_PAIRS, SCALE, SHIFT, TAKE_PAIRS
from fhe_fx.ir.program import Program
from fhe_fx.ir.views import Cat, Sum
from fhe_fx.passes.base import Pass, register

__all__ = ["FoldScales"]

_MOVES = d.STRUCTURAL - {d.CAT, PUT_PAIRS, TAKE_PAIRS}


@register
@dataclass(frozen=True)
class FoldScales(Pass):
    """Push each `scale` towards the inputs, through operators that it alone reads."""

    name: ClassVar[str] = "fold-scales"
    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated"})

    may_copy: bool = True
    """Whether a clear-weight product that others read too may be made a second time, scaled.
    Before elementwise chains are fused that would pull them apart."""

    def run(self, program: Program) -> bool:
        """Raise every factor as far as it goes, sink those left, raise what sinking added."""
        before = str(program)
        self._raise_all(program, program.calls(SCALE))
        added: list[fx.Node] = []
        for node in program.calls(SCALE):
            self._sink_fully(program, node, added)
        self._into_rows(program)
        self._raise_all(program, program.calls(SCALE) if added else [])
        self._into_rows(program)
        program.clean()
        return str(program) != before  # a factor may sink and be raised to where it was

    def _raise_all(self, program: Program, waiting: list[fx.Node]) -> None:
        while waiting:
            node = waiting.pop()
            before = set(program.calls(SCALE))
            if node not in before or not node.users:
                continue
            new = self._push(program, node)
            if new is None:
                continue
            program.replace(node, new)
            program.drop_unread()
            waiting += [n for n in program.calls(SCALE) if n not in before]

    def _sink_fully(self, program: Program, node: fx.Node, added: list[fx.Node]) -> None:
        """Sink one factor, and what it becomes, as far as it goes."""
        waiting = [node]
        while waiting:
            current = waiting.pop()
            if current not in program.graph.nodes:
                continue
            waiting += self._sink(program, current, added)
            program.drop_unread()

    def _sink(self, program: Program, node: fx.Node, added: list[fx.Node]) -> list[fx.Node]:
        """Move a factor behind each operator that reads it, where that is free."""
        x, factor = d.input_node(node), d.constant(d.input_node(node, 1))
        moved: list[fx.Node] = []
        if bool((factor == 0).any()) or bool((factor == 1).all()):
            return moved
        if d.is_map(x) and len(x.users) == 1:
            return moved  # it is where it costs nothing
        for user in list(node.users):
            b = program.before(user, self, user)
            new = self._behind(b, user, node, x, factor, added)
            if new is not None:
                program.replace(user, new)
                moved.append(new)
        return moved

    def _behind(
        self,
        b: Builder,
        user: fx.Node,
        node: fx.Node,
        x: fx.Node,
        factor: Tensor,
        added: list[fx.Node],
    ) -> fx.Node | None:
        full = factor.expand(d.shape_of(x))
        if d.is_call(user, *_MOVES):
            args = [x if a is node else a for a in user.args]
            return b.scale(b.call(user.target, *args), _shrink(d.evaluate(user, full)))
        if d.is_call(user, SHIFT):
            offset = d.constant(d.input_node(user, 1))
            return b.scale(b.shift(x, offset / factor), factor)
        if d.is_call(user, d.SUM):
            total = Sum.of(user)
            least, greatest = (f(total.dims, total.keepdim) for f in (full.amin, full.amax))
            if not torch.equal(least, greatest):
                return None
            return b.scale(b.sum(x, total.dims, total.keepdim), _shrink(least))
        if d.is_call(user, d.CAT):
            return self._behind_cat(b, user, _shrink(full), added)
        if d.is_call(user, d.ADD, d.SUB):
            return self._behind_sum(b, user, node, x, factor, added)
        return None

    def _behind_cat(
        self, b: Builder, user: fx.Node, factor: Tensor, added: list[fx.Node]
    ) -> fx.Node | None:
        """Let all parts carry a factor: their own, or the inverse of this one, raised from them."""
        cat = Cat.of(user)
        parts, dim = cat.parts, cat.dim
        bare = [p for p in parts if not d.is_call(p, SCALE)]
        if bare and not (
            (factor.numel() == 1 or factor.shape[dim] == 1)
            and all(self._takes(p, may_merge=False) for p in bare)
        ):
            return None
        factors, sources = [], []
        for part in parts:
            if part in bare:
                sources.append(b.scale(part, 1 / factor))
                added.append(sources[-1])
                factors.append(factor.expand(d.shape_of(part)))
            else:
                sources.append(d.input_node(part))
                factors.append(d.constant(d.input_node(part, 1)).expand(d.shape_of(part)))
        return b.scale(b.cat(sources, dim), _shrink(torch.cat(factors, dim)))

    def _behind_sum(
        self,
        b: Builder,
        user: fx.Node,
        node: fx.Node,
        x: fx.Node,
        factor: Tensor,
        added: list[fx.Node],
    ) -> fx.Node | None:
        left, right = (cast(fx.Node, a) for a in user.args)
        other = right if left is node else left
        if other is node:
            return None
        if d.is_call(other, SCALE) and torch.equal(
            d.constant(d.input_node(other, 1)).expand(d.shape_of(x)), factor.expand(d.shape_of(x))
        ):
            rest = d.input_node(other)  # both sides carry it
        elif _is_whole(1 / factor) or self._takes(other, may_merge=False):
            whole = (1 / factor).round() if _is_whole(1 / factor) else 1 / factor
            rest = b.scale(other, whole)
            added.append(rest)
        else:
            return None
        pair = (x, rest) if left is node else (rest, x)
        return b.scale(b.call(user.target, *pair), factor)

    def _push(self, program: Program, node: fx.Node) -> fx.Node | None:
        x, factor = d.input_node(node), d.constant(d.input_node(node, 1))
        b = program.before(node, self)
        if d.is_call(x, SCALE):
            return b.scale(d.input_node(x), factor * d.constant(d.input_node(x, 1)))
        if bool(((factor - 1).abs() < 1e-6).all()):
            return x
        is_result = all(u.op == "output" for u in node.users)
        if not self._takes(x, factor if is_result else None):
            return None
        if d.is_call(x, *_MOVES):
            source = d.input_node(x)
            moved = _before_move(x, source, factor)
            if moved is None:
                return None
            args = [b.scale(source, moved) if a is source else a for a in x.args]
            return b.call(x.target, *args)
        if d.is_call(x, SHIFT):
            offset = d.constant(d.input_node(x, 1))
            return b.shift(b.scale(d.input_node(x), factor), offset * factor)
        if d.is_call(x, LINEAR):
            weight = d.constant(d.input_node(x, 1))
            columns = _for_columns(factor, weight)
            return None if columns is None else b.linear(d.input_node(x), weight * columns)
        if d.is_call(x, d.MATMUL) and factor.numel() == 1:
            left, right = (cast(fx.Node, a) for a in x.args)
            if _is_cheap_to_copy(left):
                return b.matmul(b.scale(left, factor.reshape(())), right)
            if _is_cheap_to_copy(right):
                return b.matmul(left, b.scale(right, factor.reshape(())))
            return None
        if d.is_call(x, d.SUM):
            total = Sum.of(x)
            return b.sum(b.scale(total.x, _before_sum(x, factor)), total.dims, total.keepdim)
        if d.is_call(x, d.ADD, d.SUB):
            left, right = (b.scale(cast(fx.Node, a), factor) for a in x.args)
            return b.call(x.target, left, right)
        return None

    def _takes(self, node: fx.Node, factor: Tensor | None = None, may_merge: bool = True) -> bool:
        """Say whether a factor put on `node` goes up from there until it is absorbed.

        With the factor itself given, all of it has to be. In front of a result it costs nothing,
        and one that stops half way, at a tensor repeated for channels with different factors,
        costs an integer multiplication. With `may_merge` a factor that is there already takes it;
        without, only where that one goes on up: the quotient of two rotary factors is a tangent.
        """
        if d.is_call(node, SCALE):
            return may_merge or self._takes(d.input_node(node), factor, may_merge)
        if len(node.users) > 1 and not (self.may_copy and _is_cheap_to_copy(node)):
            return False
        if d.is_map(node) or node.op == "placeholder":
            return True
        if d.is_call(node, LINEAR):
            weight = d.constant(d.input_node(node, 1))
            return factor is None or _for_columns(factor, weight) is not None
        if d.is_call(node, d.ADD, d.SUB):
            return all(self._takes(n, factor, may_merge) for n in d.operands(node))
        if d.is_call(node, d.MATMUL):
            return any(_is_cheap_to_copy(n) for n in d.operands(node))
        if not d.is_call(node, *_MOVES, SHIFT, d.SUM):
            return False
        source = d.input_node(node)
        if factor is None or d.is_call(node, SHIFT):
            return self._takes(source, factor, may_merge)
        moved = (
            _before_sum(node, factor)
            if d.is_call(node, d.SUM)
            else _before_move(node, source, factor)
        )
        return moved is not None and self._takes(source, moved, may_merge)

    def _into_rows(self, program: Program) -> None:
        """Fold a factor of the channels that a clear matrix sums into its rows."""
        for node in program.calls(LINEAR):
            x, weight = d.input_node(node), d.constant(d.input_node(node, 1))
            if not d.is_call(x, SCALE) or weight.dim() != 2:
                continue
            row = _as_column_factor(d.constant(d.input_node(x, 1)), len(d.shape_of(x)))
            if row is not None:
                turned = row.reshape(-1, 1) if row.numel() > 1 else row
                b = program.before(node, self)
                program.replace(node, b.linear(d.input_node(x), weight * turned))


def _is_whole(factor: Tensor) -> bool:
    """Say whether a factor is one integer, by which multiplying is exact."""
    value = factor.reshape(-1)
    return factor.numel() == 1 and abs(value.item()) > 1 and _is_near_integer(value.item())


def _is_near_integer(value: float) -> bool:
    return abs(value - round(value)) <= 1e-6 * abs(value)


def _is_cheap_to_copy(node: fx.Node) -> bool:
    """Say whether `node` is a clear-weight product, moved: a second one costs no look-up."""
    while d.is_call(node, *_MOVES, SCALE, SHIFT):
        node = d.input_node(node)
    return d.is_call(node, LINEAR)


def _for_columns(factor: Tensor, weight: Tensor) -> Tensor | None:
    """Return a factor of a clear-weight product as one of its weights' columns, if it is that."""
    factor = _shrink(factor)
    while factor.dim() > 1 and factor.shape[0] == 1:
        factor = factor[0]
    if factor.dim() < 2:
        return factor
    lead = factor.shape[:-2]  # rows with weights of their own
    known = weight.shape[:-2][len(weight.shape) - 2 - len(lead) :]
    is_known = len(lead) <= weight.dim() - 2 and all(
        f in {1, w} for f, w in zip(lead, known, strict=True)
    )
    return factor if factor.shape[-2] == 1 and is_known else None


def _as_column_factor(factor: Tensor, rank: int) -> Tensor | None:
    """Return a factor that varies along the last dimension only, as a vector or one number."""
    if factor.numel() == 1:
        return factor.reshape(())
    if factor.shape[-1] == factor.numel() and factor.dim() <= rank:
        return factor.reshape(-1)
    return None


def _before_sum(node: fx.Node, factor: Tensor) -> Tensor:
    """Return the factor on the addends that equals `factor` behind their sum."""
    if factor.numel() == 1:
        return factor.reshape(())
    factor = factor.expand(d.shape_of(node))
    total = Sum.of(node)
    for dim in [] if total.keepdim else total.dims:
        factor = factor.unsqueeze(dim)
    return _shrink(factor)


def _before_move(move: fx.Node, source: fx.Node, factor: Tensor) -> Tensor | None:
    """Return the factor on `source` that equals `factor` behind a structural operator."""
    if factor.numel() == 1:
        return factor.reshape(())
    shape = d.shape_of(source)
    numbers = d.evaluate(move, torch.arange(source.meta["val"].numel()).view(shape))
    full = factor.expand(d.shape_of(move))
    before = torch.ones(source.meta["val"].numel())
    before[numbers.reshape(-1)] = full.reshape(-1)
    return _shrink(before.view(shape)) if torch.equal(before[numbers], full) else None


def _shrink(factor: Tensor) -> Tensor:
    """Give size one to the dimensions along which a factor does not vary."""
    for dim in range(factor.dim()):
        first = factor.narrow(dim, 0, 1)
        if torch.equal(first.expand(factor.shape), factor):
            factor = first
    return factor

"""Rewrites by pattern: what to look for and what to put there, as two small PyTorch functions.

    @register
    @dataclass(frozen=True)
    class SigmoidGelu(Rewrite):
        \"\"\"Replace GELU by x * sigmoid(1.702 x). Not exact: ...\"\"\"

        name: ClassVar[str] = "sigmoid-gelu"
        is_exact: ClassVar[bool] = False
        law_error: ClassVar[float] = 0.01

        def before(self, x):
            return F.gelu(x)

        def after(self, x):
            return x * torch.sigmoid(1.702 * x)

Both functions are captured and normalized as the model was, so the pattern is what the model's own
code becomes: operators, constants and shapes all have to be the same.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fhe_fx.capture import capture
from fhe_fx.errors import FheFxError, PassError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.build import Builder
from fhe_fx.ir.equivalence import FLOAT_TOLERANCE
from fhe_fx.ir.program import Program
from fhe_fx.passes import Pass, Pipeline
from fhe_fx.passes.normalize import Normalize

__all__ = ["Match", "Rewrite"]

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Match:
    """A place where a pattern was found."""

    inputs: list[fx.Node]
    """The nodes that the arguments of the two functions stand for."""
    result: fx.Node
    """The node that is replaced."""
    nodes: set[fx.Node] = field(default_factory=set)
    """All nodes of the pattern, the result among them."""


@dataclass(frozen=True)
class Rewrite(Pass):
    """A pass that replaces what `before` computes by what `after` computes."""

    requires: ClassVar[frozenset[str]] = frozenset({"normal"})
    breaks: ClassVar[frozenset[str]] = frozenset({"calibrated", "fused"})
    example_shapes: ClassVar[Shapes] = ()
    """Shapes of the arguments with which candidates are found, and the law is checked, where
    [1, 3, 4] will not do."""
    law_error: ClassVar[float] = FLOAT_TOLERANCE
    """By how much `after` may differ from `before`, in parts of the largest value, on random
    inputs: what `fhe_fx.testing.assert_law` allows. One that is not exact states it."""

    # Of any arguments, for type checkers: those that define it choose how many.
    def before(self, *inputs: Any, **none: Any) -> Tensor:
        """Return what to look for; each argument is an encrypted tensor."""
        raise NotImplementedError

    def after(self, *inputs: Any, **none: Any) -> Tensor:
        """Return what to put in its place, of the same shape."""
        raise NotImplementedError

    def where(self, match: Match) -> str | None:
        """Return why a match is to be left alone, or None."""
        return None

    @classmethod
    def shapes(cls) -> Shapes:
        """Return the shapes of the arguments with which candidates are found."""
        count = len(inspect.signature(cls.before).parameters) - 1
        return cls.example_shapes or ((1, 3, 4),) * count

    def run(self, program: Program) -> bool:
        """Replace each match, from the results back to the inputs; none is replaced twice."""
        candidates = [n for n in program.encrypted() if n.op != "placeholder"]
        gone: set[fx.Node] = set()
        for node in reversed(candidates):
            match = None if node in gone else self._match(node)
            if match is None or match.nodes & gone:
                continue
            if (reason := _shared(match) or self.where(match)) is not None:
                program.note(self, node, reason)
                continue
            self._replace(program, match)
            gone |= match.nodes
            program.clean()
        return bool(gone)

    def _match(self, node: fx.Node) -> Match | None:
        """Find the pattern's inputs by its operators, then compare all at their shapes."""
        for match in _matches(self._pattern("before", self.shapes()), node, is_strict=False):
            shapes = tuple(d.shape_of(n) for n in match.inputs)
            try:
                strict = self._pattern("before", shapes)
            except FheFxError:  # the function does not take these shapes
                continue
            found = next(_matches(strict, node, is_strict=True), None)
            if found is not None:
                return found
        return None

    def _pattern(self, name: str, shapes: Shapes) -> Program:
        key = (type(self), self, name, shapes)
        if key not in _PATTERNS:
            _PATTERNS[key] = _written(getattr(self, name), shapes)
            if name == "before":
                self._check_pattern(_PATTERNS[key])
        return _PATTERNS[key]

    def _check_pattern(self, pattern: Program) -> None:
        """Refuse what would be found everywhere, or nowhere.

        Raises:
            PassError: if `before` computes nothing, or leaves an argument unread.
        """
        if pattern.results[0] in pattern.placeholders:
            raise PassError(
                f"{self.name}: before() returns an argument as it is; there has to be an operator "
                f"to look for."
            )
        names = list(inspect.signature(self.before).parameters)
        for name, node in zip(names, pattern.placeholders, strict=True):
            if not node.users:
                raise PassError(
                    f"{self.name}: before() does not read its argument {name}, so nothing says "
                    f"which tensor that is. Leave it out."
                )

    def _replace(self, program: Program, match: Match) -> None:
        shapes = tuple(d.shape_of(n) for n in match.inputs)
        new = self._pattern("after", shapes)
        b = program.before(match.result, self, origin=match.result)
        result = _copied(b, new, match.inputs)
        if d.shape_of(result) != d.shape_of(match.result):
            raise PassError(
                f"{self.name}: after() gives the shape {list(d.shape_of(result))} for inputs of "
                f"{[list(s) for s in shapes]}; before() gives {list(d.shape_of(match.result))}."
            )
        program.replace(match.result, result)


_PATTERNS: dict[Any, Program] = {}


class _Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def _written(function: Any, shapes: Shapes) -> Program:
    """Capture a function and normalize it, as a model is."""
    kind: Any = type(function.__qualname__, (_Function,), {})  # messages give its name
    program = capture(kind(function).eval(), [torch.ones(s) for s in shapes], {}, [])
    program.name = function.__qualname__
    Pipeline((Normalize(),)).run(program)
    if len(program.results) != 1:
        raise PassError(f"{program.name} returns {len(program.results)} tensors; return one.")
    return program


# Matching -------------------------------------------------------------------------------------

Bound = dict[fx.Node, fx.Node]
"""Nodes of the program by nodes of the pattern."""


def _matches(pattern: Program, node: fx.Node, *, is_strict: bool) -> Iterator[Match]:
    """Find all ways in which a pattern ends in `node`."""
    (root,) = pattern.results
    for bound in _bind(root, node, {}, is_strict):
        inputs = [bound.get(p) for p in pattern.placeholders]
        if None not in inputs:
            nodes = {n for p, n in bound.items() if p.op in {"call_function", "call_module"}}
            yield Match([n for n in inputs if n is not None], node, nodes)


def _bind(p: fx.Node, n: fx.Node, bound: Bound, is_strict: bool) -> Iterator[Bound]:
    if p in bound:
        if bound[p] is n:
            yield bound
        return
    if p.op == "placeholder":
        if d.is_encrypted(n) and (not is_strict or d.shape_of(p) == d.shape_of(n)):
            yield {**bound, p: n}
        return
    if p.op != n.op or (is_strict and d.shape_of(p) != d.shape_of(n)):
        return
    if p.op == "get_attr":
        if not is_strict or torch.equal(d.constant(p), d.constant(n)):
            yield {**bound, p: n}
        return
    if p.op == "call_module" and not _same_function(d.map_of(p), d.map_of(n), is_strict):
        return
    if p.op == "call_function" and p.target is not n.target:
        return
    orders = [n.args]
    if d.is_call(p, d.ADD, d.MUL) and n.args[0] is not n.args[1]:
        orders.append(n.args[::-1])
    for args in orders:
        yield from _bind_arguments(p.args, args, {**bound, p: n}, is_strict)


def _bind_arguments(
    patterns: Sequence[Any], args: Sequence[Any], bound: Bound, is_strict: bool
) -> Iterator[Bound]:
    if len(patterns) != len(args):
        return
    if not patterns:
        yield bound
        return
    for one in _bind_argument(patterns[0], args[0], bound, is_strict):
        yield from _bind_arguments(patterns[1:], args[1:], one, is_strict)


def _bind_argument(p: Any, a: Any, bound: Bound, is_strict: bool) -> Iterator[Bound]:
    if isinstance(p, fx.Node) and isinstance(a, fx.Node):
        yield from _bind(p, a, bound, is_strict)
    elif isinstance(p, (list, tuple)) and isinstance(a, (list, tuple)):
        is_nodes = any(isinstance(x, fx.Node) for x in itertools.chain(p, a))
        if is_nodes or is_strict:
            yield from _bind_arguments(list(p), list(a), bound, is_strict)
        else:
            yield bound
    elif not isinstance(p, fx.Node) and not isinstance(a, fx.Node) and (not is_strict or p == a):
        yield bound


def _same_function(a: fx.GraphModule, b: fx.GraphModule, is_strict: bool) -> bool:
    """Say whether two maps apply the same steps with the same numbers."""
    ours, theirs = list(a.graph.nodes), list(b.graph.nodes)
    if len(ours) != len(theirs):
        return False
    pairs = dict(zip(ours, theirs, strict=True))
    for x, y in pairs.items():
        if x.op != y.op or (x.op == "call_function" and x.target is not y.target):
            return False
        if x.op == "get_attr":
            if is_strict and not torch.equal(d.constant(x), d.constant(y)):
                return False
        elif fx.node.map_arg((x.args, dict(x.kwargs)), pairs.__getitem__) != (
            y.args,
            dict(y.kwargs),
        ):
            return False
    return True


def _shared(match: Match) -> str | None:
    """Say which inner value is read outside of a match."""
    for n in match.nodes - {match.result}:
        if outside := [u for u in n.users if u not in match.nodes]:
            return f"{n.name}, inside the pattern, is read by {outside[0].name} too"
    return None


def _copied(b: Builder, program: Program, inputs: Sequence[fx.Node]) -> fx.Node:
    """Write a program's nodes where a builder stands."""
    known: dict[fx.Node, fx.Node] = dict(zip(program.placeholders, inputs, strict=True))
    for n in program.graph.nodes:
        if n.op == "get_attr":
            known[n] = b.constant(d.constant(n))
        elif n.op == "call_module":
            known[n] = b.map(known[d.input_node(n)], d.map_of(n), str(n.target))
        elif n.op == "call_function":
            known[n] = b.call(n.target, *fx.node.map_arg(n.args, known.__getitem__))
    return known[program.results[0]]

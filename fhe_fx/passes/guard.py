"""What a pipeline holds each pass to: it leaves a graph, tells what it did, and means the same.

A pass may be anybody's. Whatever it does, the message names the pass, the package that it is from,
the node and the printed lines; nothing of it is found out by a later pass, or by nobody.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fhe_fx import plugins
from fhe_fx.errors import FheFxError, InvariantError, PassError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.equivalence import first_difference
from fhe_fx.ir.printer import format_node, format_program
from fhe_fx.ir.program import Program
from fhe_fx.options import Options

if TYPE_CHECKING:
    from fhe_fx.passes.base import Pass

__all__ = ["CHECKED_SAMPLES", "Held", "failure", "is_foreign"]

CHECKED_SAMPLES = 2
"""Calibration samples on which a pass that is not ours is compared with the graph before it."""
_ROUNDING = 1e-6
"""What another order of operations does to a constant, in parts of the largest."""
_MOST_LINES = 12
"""Of what libraries say about an error; they may print whole graphs."""


def is_foreign(p: Pass) -> bool:
    """Say whether a pass is not part of fhe_fx."""
    return not type(p).__module__.startswith("fhe_fx.")


class Held:
    """A program as it is given to a pass, which is held against what the pass leaves.

    Args:
        p: the pass that is about to run.
        program: what it is given.
        text: the same, printed.
    """

    def __init__(self, p: Pass, program: Program, text: str) -> None:
        self.p, self.text = p, text
        self.constants = _constants(program)
        self.samples = list(program.samples[:CHECKED_SAMPLES])
        self.sources = {n.name: program.source_of(n) for n in program.placeholders}
        is_compared = p.is_exact and is_foreign(p) and bool(self.samples)
        self.given = _copy(program) if is_compared else None

    def check_graph(self, program: Program) -> None:
        """Check that there is a graph, of which the stage's rules can be asked.

        Raises:
            InvariantError: says what is missing, or which node is out of place.
        """
        for name, kind in (("module", fx.GraphModule), ("options", Options), ("properties", set)):
            if not isinstance(found := getattr(program, name), kind):
                raise InvariantError(
                    f"program.{name} is {found!r} after it, and not of {kind.__name__}"
                )
        if self.samples and not program.samples:
            raise InvariantError("it dropped the calibration samples (program.samples)")
        if [n.op for n in program.graph.nodes].count("output") != 1:
            raise InvariantError("the graph has lost its output node")
        self._check_order(program)
        self._check_inputs(program)

    @staticmethod
    def _check_order(program: Program) -> None:
        computed: set[fx.Node] = set()
        for node in program.graph.nodes:
            if late := [n for n in node.all_input_nodes if n not in computed]:
                raise InvariantError(
                    f"node {node.name} reads {late[0].name}, which is computed after it\n"
                    f"{format_program(program, {node, late[0]}, around=0)}"
                )
            computed.add(node)

    def _check_inputs(self, program: Program) -> None:
        known = set(self.sources.values())
        for node in program.placeholders:
            source = program.source_of(node)
            if source not in known or self.sources.get(node.name, source) != source:
                raise InvariantError(
                    f"input {node.name} takes argument {source} of the region; "
                    + (
                        f"before it took {self.sources[node.name]}"
                        if node.name in self.sources
                        else f"there are {len(known)}, counted from 0"
                    )
                    + f"\n{format_program(program, {node})}"
                )

    def check_answer(self, said: Any, program: Program) -> str:
        """Compare what `run` returned with what it did; return the printed program.

        Raises:
            PassError: if that is not the truth; quotes the first line that changed.
        """
        if not isinstance(said, bool):
            raise PassError(
                f"{_named(self.p)} returned {said!r}; run returns True if it changed the printed "
                f"program or a constant, else False."
            )
        after = str(program)
        constant = None
        if after == self.text:
            constant = self._changed_constant(program, 0.0 if said else _ROUNDING)
        if said == (after != self.text or constant is not None):
            return after
        if constant is not None:
            where = _first_reader(program, constant)
            raise PassError(
                f"{_named(self.p)} returned False, but constant {constant.name} changed, read by "
                f"node {where.name}.\n{format_program(program, {where})}"
            )
        raise PassError(
            f"{_named(self.p)} returned {said}, but the printed program "
            f"{'changed' if after != self.text else 'did not change'}"
            f"{_first_change(self.text, after, program)}"
        )

    def _changed_constant(self, program: Program, tolerance: float) -> fx.Node | None:
        """Return the first constant that is another; the print shows only kind and shape of most.

        A tensor that was changed in place knows it by its version. Who says that nothing changed
        may have multiplied factors in another order.
        """
        nodes: list[fx.Node] = [n for n in program.graph.nodes if n.op == "get_attr"]
        for node, (old, version) in zip(nodes, self.constants, strict=False):
            new = d.constant(node)
            is_same = version == new._version if new is old else _are_same(new, old, tolerance)
            if not is_same:
                return node
        return None

    def check_meaning(self, program: Program) -> None:
        """Run the graph before and after a pass that is not ours, and states that it is exact.

        Raises:
            PassError: names the first node that computes something else.
        """
        if self.given is None:
            return
        found = first_difference(self.given, program, self.samples)
        if found is not None:
            raise PassError(
                f"the graph no longer computes the same: {found}\n  If that is meant, set "
                f"is_exact = False and let the docstring say what changes"
            )


def failure(p: Pass, done: Sequence[str], error: BaseException) -> PassError:
    """Return the error that names a pass, its options, its package, and the passes before it."""
    options = ", ".join(f"{f.name}={getattr(p, f.name)!r}" for f in dataclasses.fields(p))
    plugin = plugins.provider(type(p))
    whose = f" of {plugin}" if plugin else ""
    return PassError(
        f"Pass {p.name}({options}){whose} failed: {_what(error)}\n"
        f"  passes before it: {', '.join(done) or 'none'}"
    )


def _what(error: BaseException) -> str:
    """Return what an error says, in words of its own if it is ours, else with its kind."""
    if isinstance(error, FheFxError):
        return str(error)
    lines = str(error).strip().splitlines()
    said = "\n".join([*lines[:_MOST_LINES], *["  ..."] * (len(lines) > _MOST_LINES)])
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _constants(program: Program) -> list[tuple[Tensor, int]]:
    found = [d.constant(n) for n in program.graph.nodes if n.op == "get_attr"]
    return [(tensor, tensor._version) for tensor in found]


def _are_same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Compare two constants that print alike; with a tolerance, their values alone."""
    if tolerance == 0:
        return a.dtype == b.dtype and torch.equal(a, b)
    if a.numel() != b.numel():
        return False
    largest = float(b.abs().max()) if b.numel() else 0.0
    a, b = a.reshape(-1).double(), b.reshape(-1).double()
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * largest)


def _copy(program: Program) -> Program:
    """Copy what is needed to run a program later as it is now."""
    return Program(
        copy.deepcopy(program.module),
        name=program.name,
        options=program.options,
        properties=set(program.properties),
        sources=dict(program.sources),
    )


def _named(p: Pass) -> str:
    plugin = plugins.provider(type(p))
    return f"{p.name} of {plugin}" if plugin else p.name


def _first_reader(program: Program, constant: fx.Node) -> fx.Node:
    readers: list[fx.Node] = [n for n in program.graph.nodes if constant in n.all_input_nodes]
    return readers[0]


def _first_change(before: str, after: str, program: Program) -> str:
    """Name the first node whose printed line changed, and quote it as it was and as it is."""
    lines = zip_longest(before.split("\n"), after.split("\n"), fillvalue="  (nothing)")
    for a, b in lines:
        if a != b:
            printed_as = {n.name: format_node(n)[0] for n in program.encrypted()}
            named = [n for n, text in printed_as.items() if b.strip().startswith(text)]
            where = f", first at node {named[0]}" if named else ""
            return f"{where}.\n  before:{a}\n  after: {b}"
    return "."

"""Mark the nodes of one submodule as the encrypted region, and check that it is one region.

Exact: the graph is not changed. The region must be convex, since a circuit runs from its inputs
to its results without asking the client in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fhe_fx.errors import CaptureError
from fhe_fx.ir.ops import ENTER, LEAVE
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register

__all__ = ["Annotate", "check_convex"]


@register
@dataclass(frozen=True)
class Annotate(Pass):
    """Set `node.meta["encrypted"]` on every node of the submodule at `path`."""

    name: ClassVar[str] = "annotate"
    requires: ClassVar[frozenset[str]] = frozenset({"captured"})
    gives: ClassVar[frozenset[str]] = frozenset({"annotated"})

    path: str = ""
    """Dotted path of the submodule."""

    def run(self, program: Program) -> bool:
        """Mark, then check.

        Raises:
            CaptureError: if the submodule is not in the graph, is called more than once, or is not
                convex.
        """
        region = [
            n
            for n in program.graph.nodes
            if n.op == "call_function" and self.path in n.meta.get("module_stack", ())
        ]
        if not any(n.target not in {ENTER, LEAVE} for n in region):
            raise CaptureError(
                f"{self.path}: nothing of this submodule is in the captured graph: its result is "
                f"not used, or does not depend on the model's input. Choose another target."
            )
        entered = [(n.args[1], n.args[2]) for n in region if n.target == ENTER]
        if len(entered) != len(set(entered)):
            raise CaptureError(
                f"{self.path} is called {max(entered.count(e) for e in entered)} times in one "
                f"forward pass; a circuit holds one call. Encrypt a part that is called once."
            )
        for node in region:
            node.meta["encrypted"] = True
        check_convex(program, self.path)
        return False


def check_convex(program: Program, path: str) -> None:
    """Check that no value leaves the marked region and comes back.

    Raises:
        CaptureError: names the float nodes in between.
    """
    region = {n for n in program.graph.nodes if n.meta.get("encrypted")}
    after: set[fx.Node] = set()
    for node in program.graph.nodes:  # in topological order
        if any(n in region or n in after for n in node.all_input_nodes):
            after.add(node)
    before: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if any(n in region or n in before for n in node.users):
            before.add(node)
    between = [
        n
        for n in program.graph.nodes
        if n in after and n in before and n not in region and n.op != "output"
    ]
    if between:
        listed = "\n".join(
            f"  {n.name}  {n.meta.get('module_path', '')}  {n.meta.get('source', '')}"
            for n in between[:8]
        )
        raise CaptureError(
            f"{path} is not one region: {len(between)} node(s) outside it lie between two of its "
            f"parts, and a circuit cannot stop for the client.\n{listed}\n"
            f"Encrypt a submodule that contains these too, or two separate ones."
        )

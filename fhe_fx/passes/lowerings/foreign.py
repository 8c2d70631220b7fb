"""What lowerings of others must keep to: the operator's shape, and its values on samples.

A pass that is not ours is run against the graph before it; a rule that is not ours is held to the
operator that it lowers, whose name, place and owner stand in every message.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from fhe_fx import plugins
from fhe_fx.errors import PassError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.equivalence import FLOAT_TOLERANCE, recorded_values
from fhe_fx.ir.printer import format_program
from fhe_fx.ir.program import Program
from fhe_fx.passes.lowerings.registry import Lowering, Unsupported, full_name, is_inexact

__all__ = ["CHECKED_SAMPLES", "check_values", "checked_call", "is_foreign"]

CHECKED_SAMPLES = 2
"""Calibration samples on which rules that are not ours are compared with their operators."""


def is_foreign(rule: Lowering) -> bool:
    """Say whether a rule is not part of fhe_fx."""
    return not getattr(rule, "__module__", "").startswith("fhe_fx.")


def checked_call(node: fx.Node, rule: Lowering, call: Callable[[], Any]) -> Any:
    """Return what a rule makes of a call.

    Args:
        node: the call in the captured graph.
        rule: of its operator; not ours.
        call: runs the rule.

    Raises:
        Unsupported: as the rule does.
        PassError: if it fails, or what it returns is no node of the operator's shape.
    """
    try:
        made = call()
    except Unsupported:
        raise
    except (Exception, SystemExit) as error:
        raise PassError(f"{_who(node, rule)} failed: {type(error).__name__}: {error}") from error
    ours = made if isinstance(made, (tuple, list)) else (made,)
    theirs = pytree.tree_leaves(node.meta["val"])
    for number, (found, expected) in enumerate(zip(ours, theirs, strict=False)):
        if not isinstance(found, fx.Node) or "val" not in found.meta:
            kind = "node of another graph" if isinstance(found, fx.Node) else type(found).__name__
            raise PassError(
                f"{_who(node, rule)} returned a {kind} as result {number}; a rule returns nodes, "
                f"which methods of its Builder make."
            )
        if d.shape_of(found) != tuple(expected.shape):
            raise PassError(
                f"{_who(node, rule)} returned the shape {list(d.shape_of(found))}; the operator "
                f"gives {list(expected.shape)}."
            )
    return made


def check_values(before: Program, after: Program, made: Mapping[fx.Node, tuple[Any, Any]]) -> None:
    """Compare what rules that are not ours made with their operators, on calibration samples.

    Args:
        before: the captured graph.
        after: the graph that was made of it.
        made: for each call whose rule is not ours, and each of its results that is taken, the
            rule and the node in `after`.

    Raises:
        PassError: names the first operator that is another, its rule and its printed lines.
    """
    checked = {n: (r, m) for n, (r, m) in made.items() if not is_inexact(r)}
    samples = after.samples[:CHECKED_SAMPLES]
    if not checked or not samples:
        return
    expected = recorded_values(before, samples)
    found = after.values(samples, {m.name for _, m in checked.values()})
    for node, (rule, new) in checked.items():
        a, b = expected[node.name], found[new.name].double()
        error, size = float((a - b).abs().max()), float(a.abs().max())
        if not error <= FLOAT_TOLERANCE * size + 1e-6 * FLOAT_TOLERANCE:
            raise PassError(
                f"{_who(node, rule)} computes something else: node {new.name} differs by "
                f"{error:.3g}, values up to {size:.3g}\n{format_program(after, {new})}\n  If that "
                f"is meant, give register_lowering(..., is_exact=False)"
            )


def _who(node: fx.Node, rule: Lowering) -> str:
    """Name a rule, its plugin, and the call that it lowers."""
    taken = node.args[0] if node.target is operator.getitem else node
    call = taken if isinstance(taken, fx.Node) else node
    plugin = _plugin_of(rule)
    whose = f" of {plugin}" if plugin else ""
    place = ", ".join(filter(None, (call.meta.get("module_path"), call.meta.get("source"))))
    return f"the lowering {full_name(rule)}{whose} of {call.target} ({place})"


def _plugin_of(rule: Lowering) -> plugins.Plugin | None:
    """Return the plugin whose module, or package, a rule is from."""
    name = getattr(rule, "__module__", "")
    while name:
        if name in sys.modules and (found := plugins.provider(sys.modules[name])) is not None:
            return found
        name = name.rpartition(".")[0]
    return None

"""Prints a program in columns: name, operator, type, bounds, module path, source line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.types import ValueType

if TYPE_CHECKING:
    from fhe_fx.ir.program import Program

__all__ = ["format_node", "format_program", "operator_name"]


def operator_name(node: fx.Node) -> str:
    """Return the short name of a node's operator; for a map, the chain of its functions."""
    if d.is_map(node) and node.target not in {"client_prefix", "encrypted", "client_suffix"}:
        steps = [
            n.target._opname.strip("_")
            for n in d.map_of(node).graph.nodes
            if n.op == "call_function" and hasattr(n.target, "_opname")
        ]
        shown = steps if len(steps) <= 4 else [*steps[:2], f"{len(steps) - 3} more", steps[-1]]
        return f"map[{' '.join(shown)}]"
    return str(getattr(node.target, "_opname", node.target))


def _constant_text(node: fx.Node) -> str:
    value = d.constant(node)
    if value.numel() == 1:
        return f"{value.item():.6g}"
    if value.dim() == 1 and value.numel() <= 8 and not value.is_floating_point():
        return f"[{' '.join(str(int(v)) for v in value)}]"
    kind = "float" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return f"{kind}[{', '.join(map(str, value.shape))}]"


def _argument_text(arg: object, names: dict[fx.Node, str]) -> str:
    if isinstance(arg, fx.Node):
        return names[arg] if arg in names else _constant_text(arg)
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(_argument_text(a, names) for a in arg)}]"
    return str(arg)


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    return {n: f"%{i}" for i, n in enumerate(n for n in graph.nodes if d.is_encrypted(n))}


def format_node(node: fx.Node, names: dict[fx.Node, str] | None = None) -> list[str]:
    """Return the columns of one node: statement, type, bounds, module path, source line."""
    names = names or _names(node.graph)
    if node.op == "placeholder":
        statement = f"{names[node]} = input()"
    elif node.op == "output":
        results = node.args[0]
        texts = [_argument_text(a, names) for a in results]  # type: ignore[union-attr]
        return [f"return {', '.join(texts)}", "", "", "", ""]
    else:
        args = ", ".join(_argument_text(a, names) for a in node.args)
        statement = f"{names[node]} = {operator_name(node)}({args})"
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return [statement, "", "", node.meta.get("module_path", ""), node.meta.get("source", "")]
    shape = ", ".join(map(str, value.shape))
    value_type = node.meta.get("type")
    if isinstance(value_type, ValueType):
        kind, bounds = str(value_type), f"in [{value_type.low}, {value_type.high}]"
    else:
        kind = "int" if node.meta["val"].dtype == torch.int64 else "float"
        low_high = node.meta.get("bounds")
        bounds = f"in [{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else ""
    return [
        statement,
        f"{kind}[{shape}]",
        bounds,
        node.meta.get("module_path", ""),
        node.meta.get("source", ""),
    ]


def format_program(program: Program, only: set[fx.Node] | None = None, around: int = 2) -> str:
    """Print a program, or the lines near the nodes `only`, each of those underlined.

    Args:
        program: what to print.
        only: nodes to point at; without it everything is printed.
        around: lines of context around each of them.
    """
    names = _names(program.graph)
    nodes = [n for n in program.graph.nodes if n.op != "get_attr"]
    rows = [format_node(n, names) for n in nodes]
    widths = [max((len(row[i]) for row in rows[:-1]), default=0) for i in range(5)]
    lines = []
    shown = set(range(len(nodes)))
    if only is not None:
        hits = [i for i, n in enumerate(nodes) if n in only]
        shown = {j for i in hits for j in range(i - around, i + around + 1)}
    for i, (node, row) in enumerate(zip(nodes, rows, strict=True)):
        if i not in shown:
            continue
        text = "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        lines.append(f"  {text}")
        if only is not None and node in only:
            lines.append(f"  {'^' * len(row[0])}")
    return "\n".join(lines)

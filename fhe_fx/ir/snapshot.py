"""A program as plain data: what a page, a picture or a comparison needs, and JSON can hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP, MASKED_SOFTMAX
from fhe_fx.ir.printer import format_node, operator_name
from fhe_fx.ir.program import Program
from fhe_fx.ir.types import ValueType
from fhe_fx.ir.views import Lookup

__all__ = ["KINDS", "snapshot"]

KINDS = ("input", "affine", "move", "map", "look-up", "product", "softmax", "result")
"""What a node is, by what it costs."""
_MAX_TABLE = 256


def snapshot(program: Program) -> dict[str, Any]:
    """Describe a program.

    Returns:
        `name`, `stage` ("captured", "float" or "integer"), the `results` by node name, and the
        `nodes` in order, each with its `name`, printed `statement`, `operator`, `kind`, `shape`,
        `type`, `bits` (None for floats), `bounds`, `look_ups` of one run, `inputs` by name,
        `module_path`, `source`, `made_by`, and for a look-up its first `table`.
    """
    stage = next((s for s in ("integer", "normal") if s in program.properties), "captured")
    names = {n: f"%{i}" for i, n in enumerate(program.encrypted())}
    return {
        "name": program.name,
        "stage": "float" if stage == "normal" else stage,
        "results": [n.name for n in program.results],
        "nodes": [_node(n, names) for n in program.encrypted()],
    }


def _node(n: fx.Node, names: dict[fx.Node, str]) -> dict[str, Any]:
    statement, kind, bounds, *_ = format_node(n, names)
    value_type = n.meta.get("type")
    value = n.meta.get("val")
    is_lookup = d.is_call(n, LOOKUP)
    return {
        "name": n.name,
        "statement": statement,
        "operator": "input" if n.op == "placeholder" else operator_name(n),
        "kind": _kind(n),
        "shape": list(value.shape) if isinstance(value, torch.Tensor) else [],
        "type": kind,
        "bits": value_type.bits if isinstance(value_type, ValueType) else None,
        "bounds": bounds,
        "look_ups": math.prod(d.shape_of(n)) if is_lookup else 0,
        "inputs": [a.name for a in d.operands(n)],
        "module_path": str(n.meta.get("module_path", "")),
        "source": str(n.meta.get("source", "")),
        "made_by": str(n.meta.get("made_by", "")),
        **(_table(n) if is_lookup else {}),
    }


def _kind(n: fx.Node) -> str:
    if n.op == "placeholder":
        return "input"
    if d.is_map(n):
        return "map"
    if d.is_call(n, LOOKUP):
        return "look-up"
    if d.is_call(n, MASKED_SOFTMAX):
        return "softmax"
    if d.is_call(n, *d.PRODUCTS):
        return "product"
    return "move" if d.is_call(n, *d.STRUCTURAL) else "affine"


def _table(n: fx.Node) -> dict[str, Any]:
    view = Lookup.of(n)
    return {
        "reads_bits": view.bits,
        "rounds_away": view.lsbs,
        "tables": view.tables.shape[0],
        "table": view.tables[0, :_MAX_TABLE].tolist(),
    }

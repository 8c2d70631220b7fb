"""Rewrite core ATen operators into the float dialect: few operators, every constant folded.

Exact to float rounding. Structure that later passes look for stays visible (softmax with its mask,
matrix products of two encrypted tensors); views, splits and selections become five operators.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fhe_fx.errors import UnsupportedOpError
from fhe_fx.ir.build import Builder
from fhe_fx.ir.ops import ENTER, LEAVE
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pass, register
from fhe_fx.passes.lowerings import LOWERINGS, Unsupported
from fhe_fx.passes.lowerings.foreign import check_values, checked_call, is_foreign
from fhe_fx.passes.lowerings.registry import TAKES_CLEAR, aten, is_clear, is_encrypted

__all__ = ["Normalize"]

_MISSING = object()


@register
@dataclass(frozen=True)
class Normalize(Pass):
    """Lower every operator by its registered rule; report all that have none at once."""

    name: ClassVar[str] = "normalize"
    requires: ClassVar[frozenset[str]] = frozenset({"captured"})
    gives: ClassVar[frozenset[str]] = frozenset({"normal"})

    def run(self, program: Program) -> bool:
        """Interpret the captured graph; what is clear is computed, what is encrypted is emitted.

        Raises:
            UnsupportedOpError: lists operator, module path and source line of each.
            PassError: names a lowering that is not ours and fails, or computes something else.
        """
        if "normal" in program.properties:
            return False
        module = fx.GraphModule(torch.nn.Module(), fx.Graph())
        end = module.graph.output(())
        values: dict[fx.Node, Any] = {}
        faults: list[tuple[fx.Node, str]] = []
        samples = list(zip(*program.samples, strict=True)) or [()] * len(program.placeholders)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                with module.graph.inserting_before(end):
                    new = module.graph.placeholder(node.name)
                given = node.meta["val"]
                is_number = given.is_floating_point() or is_clear(node)
                dtype = torch.float32 if is_number else given.dtype
                new.meta.update(node.meta, val=torch.empty(given.shape, dtype=dtype, device="meta"))
                values[node] = new
                new.meta["samples"] = samples[program.placeholders.index(node)]
                if is_clear(new):  # samples are floats
                    dtype = node.meta["val"].dtype
                    values[node] = Builder(module, end, new, self.name).computed(
                        aten.to.dtype, new, dtype
                    )
            elif node.op == "get_attr":
                value: Any = program.module
                for name in str(node.target).split("."):
                    value = getattr(value, name)
                values[node] = _as_float32(value.detach())
            elif node.op == "call_function":
                values[node] = self._lower(module, end, node, values, faults)
            elif node.op == "output":
                if faults:
                    raise UnsupportedOpError(_listing(program, faults))
                end.args = (tuple(values[n] for n in node.args[0]),)
        _check_results(program, end)
        for node in (n for n in module.graph.nodes if n.op == "placeholder"):
            del node.meta["samples"]
        captured, before = Program(program.module, sources=program.sources), str(program)
        program.module = module
        check_values(captured, program, _by_others(captured, values))
        return str(program) != before

    def _lower(
        self,
        module: fx.GraphModule,
        end: fx.Node,
        node: fx.Node,
        values: dict[fx.Node, Any],
        faults: list[tuple[fx.Node, str]],
    ) -> Any:
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        leaves = pytree.tree_leaves((args, kwargs))
        is_missing = any(leaf is _MISSING for leaf in leaves)
        if not is_missing and not any(isinstance(leaf, fx.Node) for leaf in leaves):
            with torch.no_grad():
                return pytree.tree_map(_as_float32, node.target(*args, **kwargs))  # type: ignore[operator]
        if not is_missing and not any(is_encrypted(leaf) for leaf in leaves):
            return _computed(module, end, node, args, kwargs, self.name)
        if node.target is operator.getitem:
            return _MISSING if is_missing else _result(node, args[0], args[1], faults)
        rule = LOWERINGS.get(node.target)
        if rule is None:
            faults.append((node, "no lowering is registered for it"))
        if rule is None or is_missing:  # what a rule says of its arguments is not known yet
            return _MISSING
        builder = Builder(module, end, node, self.name)
        if node.target not in TAKES_CLEAR:
            args, kwargs = fx.node.map_aggregate(
                (args, kwargs),
                lambda a: builder.promoted(cast(fx.Node, a)) if is_clear(a) else a,
            )
        try:
            if is_foreign(rule):
                return checked_call(node, rule, lambda: rule(builder, *args, **kwargs))
            return rule(builder, *args, **kwargs)
        except Unsupported as reason:
            faults.append((node, str(reason)))
            return _MISSING


def _computed(
    module: fx.GraphModule, end: fx.Node, node: fx.Node, args: Any, kwargs: Any, made_by: str
) -> Any:
    """Leave what depends on clear inputs alone to the client, operator by operator."""
    if node.target in {ENTER, LEAVE}:
        return args[0]
    if node.target is operator.getitem and isinstance(args[0], tuple):
        return args[0][args[1]]
    return Builder(module, end, node, made_by).computed(node.target, *args, **kwargs)


def _by_others(captured: Program, values: dict[fx.Node, Any]) -> dict[fx.Node, tuple[Any, Any]]:
    """Return rule and lowered node of every result of a rule that is not ours."""
    found = {}
    for node in captured.graph.nodes:
        call = node.args[0] if node.target is operator.getitem else node
        rule = LOWERINGS.get(call.target) if isinstance(call, fx.Node) else None
        if rule is not None and is_foreign(rule) and is_encrypted(values.get(node)):
            found[node] = (rule, values[node])
    return found


def _result(node: fx.Node, values: Any, number: Any, faults: list[tuple[fx.Node, str]]) -> Any:
    """Take one of several results, unless its rule makes none of that number."""
    if number < len(values):
        return values[number]
    faults.append((cast(fx.Node, node.args[0]), f"its result {number} cannot be computed"))
    return _MISSING


def _as_float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float32)
    return value


def _check_results(program: Program, end: fx.Node) -> None:
    clear = [i for i, r in enumerate(end.args[0]) if not is_encrypted(r)]  # type: ignore[arg-type]
    if clear:
        raise UnsupportedOpError(
            f"{program.name}: result(s) {clear} do not depend on an encrypted input. "
            f"Choose a target whose results all do."
        )


def _listing(program: Program, faults: list[tuple[fx.Node, str]]) -> str:
    lines = [
        f"  {node.target}  {node.meta.get('module_path', '')}  {node.meta.get('source', '')}: {why}"
        for node, why in faults
    ]
    return (
        f"{program.name}: {len(faults)} operator(s) cannot run on encrypted data.\n"
        + "\n".join(lines)
        + "\nEncrypt a submodule without them, or register a lowering for each: "
        "@fhe_fx.register_lowering(torch.ops.aten.<name>) (docs/writing_a_pass.md)."
    )

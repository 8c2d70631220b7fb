"""Captures a whole model as one graph of core ATen operators that knows its submodules.

`torch.export` records the module stack of every node. The arguments and results of each target are
marked besides, by two identity operators that hooks insert while the model is traced, so that the
graph's edges can be matched with the arguments of the module's own `forward`.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fhe_fx.capture.marks import ClearLeaves, marked, no_leaves
from fhe_fx.capture.reads import leaves_read, until_left
from fhe_fx.errors import CaptureError
from fhe_fx.ir.program import Program
from fhe_fx.options import Options

__all__ = [
    "capture",
    "check_static",
    "decompose",
    "graph_of",
    "graph_of_exported",
    "is_assertion",
    "program_of",
]

_KEPT_WHOLE = (
    torch.ops.aten.matmul.default,
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.linear.default,
    # These become a choice between two branches of which the unused one overflows.
    torch.ops.aten.softplus.default,
    torch.ops.aten.mish.default,
    torch.ops.aten.celu.default,
    # This one becomes a minimum with a tensor of zeros, which has no lowering.
    torch.ops.aten.log_sigmoid.default,
)
"""Operators whose decomposition would hide what the passes look for, or lose what is exact."""


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    targets: Sequence[str],
    clear: ClearLeaves = no_leaves,
    *,
    is_whole: bool = True,
) -> Program:
    """Trace a model with the arguments and results of `targets` marked.

    Args:
        model: in eval mode; hooks are put on the targets while it is traced, and removed.
        args: positional example inputs.
        kwargs: keyword example inputs.
        targets: dotted paths.
        clear: which leaves of a target's call are clear; they are marked like those that are
            encrypted, whatever numbers they hold.
        is_whole: whether to trace the model to its end. Without it the graph ends behind the last
            target, with the results that are read from there on, where these can be told.

    Raises:
        CaptureError: if torch.export cannot capture the model.
    """
    with marked(model, targets, clear):
        # torch.export walks a graph node by node, without calling it.
        is_whole = is_whole or isinstance(model, fx.GraphModule)
        reads = None if is_whole else leaves_read(model, args, kwargs, targets)
        with contextlib.nullcontext() if reads is None else until_left(model, reads):
            exported = _export(model, args, kwargs)
    program = program_of(exported, name=type(model).__name__)
    _use_first_names(program, model)
    return program


def graph_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.GraphModule:
    """Trace a model as a graph of ATen operators that is called as the model is.

    Args:
        model: in eval mode.
        args: positional example inputs, whose shapes the graph takes.
        kwargs: keyword example inputs.

    Raises:
        CaptureError: if torch.export cannot capture the model.
    """
    return graph_of_exported(_export(model, args, kwargs))


def graph_of_exported(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """Return the graph of an exported program, without its checks of inputs.

    Raises:
        CaptureError: if its shapes are dynamic.
    """
    module: fx.GraphModule = _quietly(lambda: exported.module(check_guards=False))
    for node in module.graph.nodes:
        if node.op == "placeholder" and isinstance(value := node.meta.get("val"), Tensor):
            check_static(node.name, value)
        if is_assertion(node):
            module.graph.erase_node(node)
    # A module of its own is without the check that arguments are given by place or by name as they
    # were when it was exported.
    return fx.GraphModule(module, module.graph)


def check_static(name: str, value: Tensor) -> None:
    """Refuse an input of an exported program whose shape is not known.

    Raises:
        CaptureError: names it.
    """
    if not all(isinstance(n, int) for n in value.shape):
        raise CaptureError(
            f"The exported program's input {name} has the dynamic shape {list(value.shape)}; a "
            f"circuit has one shape. Export without dynamic_shapes."
        )


def is_assertion(node: fx.Node) -> bool:
    """Say whether a node only checks what another computes."""
    return node.op == "call_function" and not node.users and "_assert" in str(node.target)


def _export(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    try:
        exported: torch.export.ExportedProgram = _quietly(
            lambda: torch.export.export(model, tuple(args), dict(kwargs), strict=False)
        )
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error
    return exported


def program_of(exported: torch.export.ExportedProgram, name: str) -> Program:
    """Turn an exported program into a program whose graph is core ATen with constants folded."""
    return Program(decompose(exported), name=name, options=Options())


def decompose(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """Lower an exported program to core ATen and fold what does not depend on its inputs.

    Returns:
        A graph whose placeholders are the tensors among the flattened inputs and whose output is
        the tuple of tensors among the flattened results.
    """
    table = torch.export.default_decompositions()
    for op in _KEPT_WHOLE:
        table.pop(op, None)
    lowered = _quietly(lambda: exported.run_decompositions(table))
    unlifted = _quietly(lambda: lowered.module(check_guards=False))
    unlifted.graph.set_codegen(fx.graph.CodeGen())
    module = fx.GraphModule(unlifted, unlifted.graph)  # without the input checks of torch.export
    output = next(iter(reversed(module.graph.nodes)))
    leaves = [n for n in pytree.tree_leaves(output.args[0]) if isinstance(n, fx.Node)]
    output.args = (tuple(leaves),)
    for node in list(module.graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            node.replace_all_uses_with(None)
            module.graph.erase_node(node)
        elif is_assertion(node):
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    _locate(module)
    _fold_constants(module)
    module.recompile()
    return module


def _quietly(action: Any) -> Any:
    """Run an export step without the warnings that torch gives about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


def _explain(model: nn.Module, error: Exception) -> str:
    name, text = type(model).__name__, str(error)
    where = re.findall(r'File "([^"]+)", line (\d+)', text)
    line = f" ({where[-1][0].rsplit('/', 1)[-1]}:{where[-1][1]})" if where else ""
    if "data-dependent" in text.lower() or "GuardOnDataDependent" in type(error).__name__:
        return (
            f"{name} branches on the values of its tensors{line}; a circuit has no branches. "
            f"Replace the branch by torch.where, or encrypt a submodule that does not contain it."
        )
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return (
        f"torch.export cannot capture {name}: {first}{line}. "
        f"Check that the model runs on the example inputs, and that its forward is exportable."
    )


def _locate(module: fx.GraphModule) -> None:
    """Write module path and source line of every node under short keys of its meta."""
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["module_stack"] = tuple(str(path).split("@")[0] for path, _ in stack.values())
            node.meta["module_path"] = node.meta["module_stack"][-1]
        frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
        own = [f for f in frames if "/torch/" not in f[0]] or frames
        if own:
            node.meta["source"] = f"{own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]}"


def _use_first_names(program: Program, model: nn.Module) -> None:
    """Let a module that stands in several places be known by the first of its paths."""
    first = {module: name for name, module in model.named_modules()}
    names = {name: first[m] for name, m in model.named_modules(remove_duplicate=False)}
    for node in program.graph.nodes:
        if "module_stack" in node.meta:
            stack = tuple(names.get(path, path) for path in node.meta["module_stack"])
            node.meta.update(module_stack=stack, module_path=stack[-1])


class _Folder(fx.Interpreter):
    """Evaluates the nodes of a graph that do not depend on its placeholders."""

    def fold(self, graph: fx.Graph) -> dict[fx.Node, Any]:
        known: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                known[node] = self.fetch_attr(str(node.target))
            elif node.op == "call_function" and all(n in known for n in node.all_input_nodes):
                args = fx.node.map_arg(node.args, known.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
                with torch.no_grad():
                    known[node] = node.target(*args, **kwargs)
        return known


def _fold_constants(module: fx.GraphModule) -> None:
    known = _Folder(module).fold(module.graph)
    needed = [
        n
        for n in known
        if n.op != "get_attr"
        and isinstance(known[n], Tensor)
        and any(u not in known for u in n.users)
    ]
    for number, node in enumerate(needed):
        name = f"folded_{number}"
        module.register_buffer(name, known[node].detach().clone())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        constant.meta.update(
            {k: node.meta[k] for k in ("val", "module_path", "source") if k in node.meta}
        )
        node.replace_all_uses_with(constant)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()

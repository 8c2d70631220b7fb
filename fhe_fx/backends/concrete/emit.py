"""Emits a Concrete function from an integer program, node by node, with declared widths.

Concrete finds the width of each value by evaluating a set of inputs. Here every width is known: it
is the node's value type. So each traced value carries its type, and `as_declared` hands the types
to Concrete in place of what it would measure.

Concrete puts a look-up behind a rounding that none follows. Behind a result's there is no need: its
low bits are only not decrypted. Its type there is unsigned, so that the client is given the bit
above, too (`ops.round`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from concrete import fhe
from concrete.fhe.mlir.processors.process_rounding import ProcessRounding
from concrete.fhe.representation import Graph, Node
from torch import fx

from fhe_fx.errors import BackendError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import GATE, LINEAR, LOOKUP, ROUND, SCALE, SHIFT
from fhe_fx.ir.printer import operator_name
from fhe_fx.ir.program import Program
from fhe_fx.ir.types import ValueType

__all__ = ["as_declared", "emit_function"]

_BOUNDS = "fhe_fx_bounds"
_IS_RESULT = "fhe_fx_is_result"
_LOCK = threading.Lock()


def emit_function(program: Program) -> Callable[..., Any]:
    """Return a function of the program's placeholders that Concrete can trace."""
    names = [n.name for n in program.placeholders]

    def function(*args: Any, **inputs: Any) -> Any:
        given = args or [inputs[name] for name in names]
        results = _Emitter(program.module).run(*given)
        return results if len(results) > 1 else results[0]

    return function


@contextlib.contextmanager
def as_declared() -> Iterator[None]:
    """Let Concrete take the bounds that the emitter declared, and leave roundings of results be."""
    measure, follow = Graph.measure_bounds, ProcessRounding.process_successors

    def declare(self: Graph, inputset: Any) -> Any:
        bounds = measure(self, inputset)
        for node, measured in bounds.items():
            if (declared := node.properties.get(_BOUNDS)) is not None:
                measured["min"], measured["max"] = (np.int64(b) for b in declared)
        return bounds

    def follow_others(self: ProcessRounding, graph: Graph, node: Node) -> None:
        if not node.properties.get(_IS_RESULT):
            follow(self, graph, node)

    _prepare_thread()
    with _LOCK:
        Graph.measure_bounds = declare
        ProcessRounding.process_successors = follow_others
        try:
            yield
        finally:
            Graph.measure_bounds = measure
            ProcessRounding.process_successors = follow


def _prepare_thread() -> None:
    """Give this thread the state that Concrete sets up in the thread that imported it alone."""
    extensions = "concrete.fhe.extensions"
    for module, state, name, initial in (
        ("tag", "tag_context", "stack", []),
        ("round_bit_pattern", "local", "_is_adjusting", False),
        ("truncate_bit_pattern", "local", "_is_adjusting", False),
    ):
        held = getattr(sys.modules[f"{extensions}.{module}"], state)
        if not hasattr(held, name):
            setattr(held, name, initial)


class _Emitter(fx.Interpreter):
    """Evaluates a program on Concrete tracers (or on numpy arrays, with the same meaning)."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return d.constant(n).numpy()
        if n.op == "call_function":
            args = fx.node.map_arg(n.args, self.env.__getitem__)
            with fhe.tag(str(n.meta.get("module_path", "")).replace(".", "/") or "region"):
                value = self._emit(n, args)
        else:
            value = super().run_node(n)
        if d.is_encrypted(n) and isinstance(value, fhe.tracing.Tracer):
            value_type: ValueType = n.meta["type"]
            bounds = value_type.low, value_type.high
            value.computation.properties.setdefault(_BOUNDS, bounds)
        return value

    def _emit(self, n: fx.Node, args: Sequence[Any]) -> Any:
        x = args[0]
        shape = d.shape_of(n)
        if d.is_call(n, d.ADD):
            return x + args[1]
        if d.is_call(n, d.SUB):
            return x - args[1]
        if d.is_call(n, SHIFT):
            return x + args[1]
        if d.is_call(n, SCALE, GATE):
            return x * args[1]
        if d.is_call(n, LINEAR):
            return x @ args[1]
        if d.is_call(n, d.SUM):
            return np.sum(x, axis=tuple(args[1]), keepdims=bool(args[2]))
        if d.is_call(n, d.VIEW):
            return x.reshape(shape)
        if d.is_call(n, d.PERMUTE):
            return np.transpose(x, tuple(args[1]))
        if d.is_call(n, d.EXPAND):
            return np.broadcast_to(x, shape)
        if d.is_call(n, d.INDEX_SELECT):
            return x[(slice(None),) * args[1] + (args[2],)]
        if d.is_call(n, d.CAT):
            return np.concatenate(tuple(x), axis=args[1])
        if d.is_call(n, LOOKUP):
            return self._lookup(n, x, *args[1:])
        if d.is_call(n, ROUND):
            return self._round(x, *args[1:])
        raise BackendError(f"The Concrete backend cannot emit {operator_name(n)}.")

    def _lookup(self, n: fx.Node, x: Any, tables: Any, which: Any, bits: int, lsbs: int) -> Any:
        if lsbs:
            x = _rounded(x, lsbs)
            if isinstance(x, fhe.tracing.Tracer):
                source: ValueType = d.input_node(n).meta["type"]
                x.computation.properties[_BOUNDS] = (source.low, source.high)
        which = np.broadcast_to(which, d.shape_of(n))
        size = 1 << bits

        def table(value: Any) -> Any:
            # The reference look-up, on values already rounded: anti-periodic beyond its ends.
            index = np.mod((np.asarray(value, dtype=np.int64) >> lsbs) + size // 2, 2 * size)
            sign = np.where(index < size, 1, -1)
            return (sign * tables[which, np.mod(index, size)]).astype(np.int64)

        table.__name__ = "table"
        return fhe.univariate(table)(x)

    def _round(self, x: Any, bits: int, lsbs: int) -> Any:
        x = _rounded(x, lsbs)
        if isinstance(x, fhe.tracing.Tracer):
            properties = x.computation.properties
            properties[_IS_RESULT], properties[_BOUNDS] = True, (0, (1 << bits + lsbs) - 1)
        return x


def _rounded(x: Any, lsbs: int) -> Any:
    return fhe.round_bit_pattern(
        x, lsbs_to_remove=lsbs, exactness=fhe.Exactness.APPROXIMATE, overflow_protection=False
    )

"""A lowered program in one file, and the content by which it is known.

The file is safetensors with a JSON text in it; nothing in it is executed to read it. It differs
from what `graph_to_entries` writes for a server by the value types, names and provenance of nodes,
so that what is read is the program that was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import torch as safetensors
from torch import Tensor, fx
from torch._ops import OpOverload

from fhe_fx.capture.digest import bytes_of, digest_of_code
from fhe_fx.errors import ArtifactError
from fhe_fx.export.graph import describe, operator_of, rebuild
from fhe_fx.export.manifest import versions
from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Note, Program
from fhe_fx.ir.types import ValueType
from fhe_fx.ir.verify import verify
from fhe_fx.passes.base import Pipeline

__all__ = ["lowered_from_bytes", "lowered_to_bytes", "lowering_key"]

_TEXT = "program.json"
_WORDS = (
    "module_path", "source", "function", "error_variance", "overflow", "result_overflow", "made_by",
    "reading_of",
)  # fmt: skip
"""What a node of an integer program says of itself beside its type."""
_NARROWER = (torch.int8, torch.int16, torch.int32)
_OWN_OPERATORS = {"aten", "prims", "fhe_fx"}


# The file -------------------------------------------------------------------------------------


def lowered_to_bytes(program: Program) -> bytes:
    """Write an integer program whole, but for its calibration samples."""
    tensors: dict[str, Tensor] = {}
    nodes = describe(program.module, tensors)["nodes"]
    for number, (call, n) in enumerate(zip(nodes, _described(program.module), strict=True)):
        if n.op == "output":
            continue
        value: Tensor = n.meta["val"]
        kind: ValueType = n.meta["type"]
        call["name"] = n.name
        call["shape"], call["dtype"] = list(value.shape), str(value.dtype).removeprefix("torch.")
        call["low"], call["high"] = kind.low, kind.high
        call["words"] = {key: str(n.meta[key]) for key in _WORDS if key in n.meta}
        tensors[f"{number}.scale"] = kind.scale.contiguous().clone()
        tensors[f"{number}.offset"] = kind.offset.contiguous().clone()
    narrowed = {name: _narrow(t) for name, t in tensors.items()}
    text = json.dumps(
        {
            "name": program.name,
            "nodes": nodes,
            "notes": [dataclasses.asdict(note) for note in program.notes],
            "p_error": program.options.p_error,
            "result_bits": program.options.result_bits,
            "properties": sorted(program.properties),
            "sources": program.sources,
            "widened": [name for name, t in narrowed.items() if t.dtype != tensors[name].dtype],
        }
    )
    narrowed[_TEXT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return safetensors.save(narrowed)


def lowered_from_bytes(content: bytes, captured: Program) -> Program:
    """Read what `lowered_to_bytes` wrote.

    Args:
        content: the file.
        captured: the region that it was lowered from, for samples and options.

    Raises:
        ArtifactError: if it is malformed, or breaks a rule of the dialect.
    """
    try:
        tensors = safetensors.load(content)
        written = json.loads(bytes(tensors.pop(_TEXT).numpy()))
        for name in written["widened"]:
            tensors[name] = tensors[name].long()
        module = rebuild({"nodes": written["nodes"]}, tensors, operator_of)
        for number, (call, n) in enumerate(zip(written["nodes"], _described(module), strict=True)):
            if n.op != "output":
                _restore(n, call, tensors[f"{number}.scale"], tensors[f"{number}.offset"])
        for n in module.graph.nodes:
            if n.op == "get_attr":
                n.meta["val"] = torch.empty_like(d.constant(n), device="meta")
        program = Program(
            module,
            name=str(written["name"]),
            options=dataclasses.replace(
                captured.options, p_error=written["p_error"], result_bits=written["result_bits"]
            ),
            samples=captured.samples,
            properties=set(written["properties"]),
            notes=[Note(**note) for note in written["notes"]],
            sources={str(k): int(v) for k, v in written["sources"].items()},
        )
        verify(program)
    except Exception as error:  # whatever the bytes hold, the answer is one sentence
        raise ArtifactError(
            f"A lowered program cannot be read ({type(error).__name__}: {error})."
        ) from error
    return program


def _restore(n: fx.Node, call: dict[str, Any], scale: Tensor, offset: Tensor) -> None:
    dtype = {"int64": torch.int64}[call["dtype"]]
    n.meta["val"] = torch.empty(call["shape"], dtype=dtype, device="meta")
    n.meta["type"] = ValueType(scale, offset, int(call["low"]), int(call["high"]))
    n.meta.update({key: str(call["words"][key]) for key in _WORDS if key in call["words"]})


def _described(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Iterate over the nodes that `describe` describes."""
    return (n for n in module.graph.nodes if n.op != "get_attr")


def _narrow(t: Tensor) -> Tensor:
    """Hold 64-bit integers in the narrowest type that has room for them."""
    if t.dtype != torch.int64 or t.numel() == 0:
        return t
    least, greatest = int(t.min()), int(t.max())
    for dtype in _NARROWER:
        if torch.iinfo(dtype).min <= least and greatest <= torch.iinfo(dtype).max:
            return t.to(dtype)
    return t


# The key --------------------------------------------------------------------------------------


def lowering_key(captured: Program, pipeline: Pipeline) -> str | None:
    """Return a hash of all that a lowering depends on, or None if that cannot be told.

    These are the graph with its weights and provenance, the calibration samples, the options, the
    passes with their options, the versions and the code of the compiler, and for passes of other
    packages these packages' code. A function of the graph that is implemented by an operator of
    another library cannot be told by content.
    """
    found = hashlib.sha256()
    sources = _foreign_sources(pipeline)
    if sources is None or not _feed(found, captured.module):
        return None
    told = (
        captured.name,
        sorted(captured.properties),
        sorted(captured.sources.items()),
        repr(captured.options),
        [repr(p) for p in pipeline],
        sorted(versions().items()),
        digest_of_code(),
        len(captured.samples),
    )
    found.update(repr(told).encode())
    for path in sources:
        found.update(str(path.name).encode() + path.read_bytes())
    for value in (x for sample in captured.samples for x in sample):
        _feed_tensor(found, value)
    return found.hexdigest()


def _feed(found: Any, module: fx.GraphModule) -> bool:
    """Hash a graph and what it calls; return whether its content is all that it means."""
    for n in module.graph.nodes:
        if n.op == "call_function" and not (
            isinstance(n.target, OpOverload) and n.target.namespace in _OWN_OPERATORS
        ):
            return False
        value = n.meta.get("val")
        shape = list(value.shape) if isinstance(value, Tensor) else None
        said = [n.meta.get(key) for key in ("module_path", "source")]
        found.update(repr((n.name, n.op, str(n.target), n.args, n.kwargs, shape, said)).encode())
        if any(isinstance(a, Tensor) for a in (*n.args, *n.kwargs.values())):
            return False  # its print is not its content
        if n.op == "get_attr":
            _feed_tensor(found, d.constant(n))
        elif n.op == "call_module":
            inner = module.get_submodule(str(n.target))
            if not isinstance(inner, fx.GraphModule) or not _feed(found, inner):
                return False
    return True


def _feed_tensor(found: Any, value: Tensor) -> None:
    found.update(f"{value.dtype} {list(value.shape)}".encode())
    found.update(bytes_of(value))


def _foreign_sources(pipeline: Pipeline) -> list[Path] | None:
    """List the files of the packages that passes come from, ours aside; None if one has none."""
    modules = {type(p).__module__ for p in pipeline}
    files: set[Path] = set()
    for name in modules:
        top = name.partition(".")[0]
        if top == "fhe_fx":
            continue
        package = sys.modules.get(top)
        folder = getattr(package, "__path__", None)
        if folder:
            files.update(p for place in folder for p in Path(place).rglob("*.py"))
            continue
        try:
            files.add(Path(cast(str, inspect.getsourcefile(sys.modules[name]))))
        except (KeyError, TypeError):
            return None
    return sorted(files)

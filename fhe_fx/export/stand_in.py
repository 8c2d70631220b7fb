"""The client's side of a part as JSON and safetensors: how it is called, prefix and suffix.

No weight of the encrypted region is among it, nor anything that the region computed: of the
recorded results the shapes alone are written.
"""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fhe_fx.errors import ArtifactError, InputError
from fhe_fx.export.graph import Operator, describe, rebuild
from fhe_fx.ir import dialect as d
from fhe_fx.passes.partition import ENCRYPTED
from fhe_fx.runtime.client import ClientModule, ClientRegion
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.module import EncryptedModule
from fhe_fx.runtime.signature import Signature

__all__ = ["STAND_IN_FILES", "client_module", "client_tensors", "stand_in_files"]

STAND_IN_FILES = ("stand_in.json", "stand_in.safetensors")

_MOST_CLEAR = 64
"""Different clear inputs of one length, such as masks, under which rows are proved to be causal."""

aten = torch.ops.aten
_MOVES = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.view.default,
    aten.alias.default,
)
"""What clear inputs are moved and converted by, before a circuit takes them."""
_FLOAT_OPERATORS: dict[str, Operator] = {str(op): op for op in (*d.FLOAT_OPS, *_MOVES)}


def client_tensors(module: EncryptedModule) -> dict[str, Tensor]:
    """Return every tensor that `stand_in_files` writes, by its name there."""
    return _described(module)[1]


def stand_in_files(module: EncryptedModule) -> dict[str, bytes]:
    """Write what a client needs to let a server run a part.

    Raises:
        ArtifactError: if the call or the result of the part holds what cannot be written.
    """
    described, tensors = _described(module)
    contents = (json.dumps(described, indent=1).encode(), safetensors.save(tensors))
    return dict(zip(STAND_IN_FILES, contents, strict=True))


def _described(module: EncryptedModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    region, signature = module.region, module.signature
    tensors: dict[str, Tensor] = {}
    try:
        described = {
            "name": region.name,
            "circuit": region.circuit_name,
            "input_shapes": region.input_shapes,
            "tokens": region.tokens,
            "encrypted": signature.encrypted,
            "clear": signature.clear,
            "results": signature.results,
            "others": {
                name: _leaf(value, f"others.{name}", tensors)
                for name, value in signature.others.items()
            },
            "output": _written_output(signature, tensors),
            "causal": _causal(module),
            "causal_under_clear": _causal_under_clear(module),
            "composed": _composed(region.composed, tensors),
        }
    except ArtifactError as error:
        raise ArtifactError(f"{region.name}: {error}") from error
    return described, tensors


def _composed(composed: fx.GraphModule, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe prefix and suffix.

    Raises:
        ArtifactError: if they hold an operator that clients do not know.
    """
    parts = [composed, *(m for m in composed.children() if isinstance(m, fx.GraphModule))]
    unknown = {
        str(n.target)
        for part in parts
        for n in part.graph.nodes
        if isinstance(n.target, OpOverload) and not _is_known(n.target)
    }
    if unknown:
        raise ArtifactError(
            f"a client would compute {', '.join(sorted(unknown))} on clear inputs, and knows no "
            f"such operators. Compute them before the submodule is called."
        )
    return describe(composed, tensors, "composed.", {ENCRYPTED})


def _causal(module: EncryptedModule) -> list[dict[str, Any]]:
    """Prove on the graph whether rows in the first axis after the batch may be left out."""
    region = module.region
    axes = tuple(1 for _ in region.input_shapes)
    if any(len(shape) < 2 for shape in region.input_shapes):
        return []
    found = region.causal(axes)
    return [] if found is None else [{"axes": axes, "results": sorted(found.items())}]


def _causal_under_clear(module: EncryptedModule) -> dict[str, list[tuple[int, int]]]:
    """Prove the same for each shorter length, under the clear inputs that calibration gave.

    A client has no graph on which to prove it for others.
    """
    shapes, names = module.region.input_shapes, module.signature.encrypted
    is_clear = [name in module.signature.clear for name in names]
    lengths = {
        s[1] if len(s) > 1 else 0 for s, clear in zip(shapes, is_clear, strict=True) if not clear
    }
    if not any(is_clear) or len(lengths) != 1 or 0 in lengths:
        return {}
    (length,) = lengths
    proved: dict[str, list[tuple[int, int]]] = {}
    for given in range(1, length):
        seen: set[bytes] = set()
        for sample in module.region.target.samples:
            inputs = [
                _cut(x, length, given) if clear else x.narrow(1, 0, given)
                for x, clear in zip(sample, is_clear, strict=True)
            ]
            told = [x.float().numpy().tobytes() for x, c in zip(inputs, is_clear, strict=True) if c]
            if b"".join(told) in seen or len(seen) == _MOST_CLEAR:
                continue
            seen.add(b"".join(told))
            with contextlib.suppress(InputError):  # such a call is refused
                digest, axes = module.fitting.asked_of(inputs)
                proved[digest] = sorted(axes.items())
    return proved


def _cut(x: Tensor, length: int, given: int) -> Tensor:
    """Keep the leading part of a clear input, in all axes but the first that are as long."""
    for axis in range(1, x.dim()):
        if x.shape[axis] == length:
            x = x.narrow(axis, 0, given)
    return x.contiguous()


def client_module(
    skeleton: torch.nn.Module, files: Mapping[str, bytes], codec: Codec
) -> ClientModule:
    """Build what stands in a client's model.

    Args:
        skeleton: what stands there now; its weights are dropped.
        files: what `stand_in_files` returned.
        codec: of the circuit.

    Raises:
        ArtifactError: if the files are malformed.
    """
    try:
        described = json.loads(files[STAND_IN_FILES[0]])
        tensors = safetensors.load(files[STAND_IN_FILES[1]])
        signature = Signature(
            encrypted=tuple(described["encrypted"]),
            clear={str(k): float(v) for k, v in described["clear"].items()},
            others={
                name: _read_leaf(value, tensors) for name, value in described["others"].items()
            },
            results=tuple(int(n) for n in described["results"]),
            output=_read_output(described["output"], tensors),
        )
        region = ClientRegion(
            name=str(described["name"]),
            circuit_name=str(described["circuit"]),
            composed=rebuild(described["composed"], tensors, _operator),
            codec=codec,
            input_shapes=tuple(tuple(int(n) for n in s) for s in described["input_shapes"]),
            tokens=described["tokens"],
            causal_axes={
                tuple(found["axes"]): {int(k): int(a) for k, a in found["results"]}
                for found in described["causal"]
            },
            causal_under_clear={
                str(digest): {int(k): int(a) for k, a in axes}
                for digest, axes in described["causal_under_clear"].items()
            },
        )
    except ArtifactError:
        raise
    except Exception as error:  # whatever the bytes hold, the answer is one sentence
        raise ArtifactError(
            f"{STAND_IN_FILES[0]} cannot be read ({type(error).__name__}: {error}). "
            f"Save the model again."
        ) from error
    return ClientModule(skeleton, region, signature)


def _is_known(operator: Any) -> bool:
    try:
        _operator(str(operator))
    except (ValueError, AttributeError):
        return False
    return True


def _operator(name: str) -> Operator:
    """Return an operator of the float dialect, or one that works element by element."""
    if name in _FLOAT_OPERATORS:
        return _FLOAT_OPERATORS[name]
    if name == "_item":  # takes one result of a part
        return operator.getitem
    namespace, packet, overload = name.split(".")
    found: Any = getattr(getattr(torch.ops.aten, packet), overload)
    is_pointwise = torch.Tag.pointwise in found.tags and not found._schema.is_mutable
    if namespace != "aten" or not is_pointwise:
        raise ValueError(f"{name} is no operator of the float dialect")
    return found  # type: ignore[no-any-return]


# Leaves and structure of a call -----------------------------------------------------------------


def _leaf(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ArtifactError(
        f"{name} was a {type(value).__name__} when the part was encrypted, and only tensors, "
        f"numbers and words can be written. Encrypt with an example that does not give it."
    )


def _read_leaf(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    return tensors[value["tensor"]] if isinstance(value, dict) else value


def _written_output(signature: Signature, tensors: dict[str, Tensor]) -> Any:
    leaves, spec = pytree.tree_flatten(signature.output)
    written = []
    for number, leaf in enumerate(leaves):
        if number in signature.results:
            written.append({"shape": list(leaf.shape)})
        else:
            written.append(_leaf(leaf, f"output.{number}", tensors))
    numbered = pytree.tree_unflatten(list(range(len(leaves))), spec)
    return {"leaves": written, "structure": _structure(numbered)}


def _structure(tree: Any) -> Any:
    """Describe tuples, lists, dictionaries and outputs of transformers, leaves as numbers."""
    if isinstance(tree, int):
        return tree
    if type(tree) in {tuple, list}:
        return {type(tree).__name__: [_structure(t) for t in tree]}
    if type(tree) is dict and all(isinstance(k, str) for k in tree):
        return {"dict": {k: _structure(t) for k, t in tree.items()}}
    name = type(tree).__name__
    if _model_output(name) is type(tree):
        return {"fields": {k: _structure(t) for k, t in tree.items()}, "class": name}
    raise ArtifactError(
        f"it returns a {name}; tensors, tuples, lists, dictionaries and the outputs of "
        f"transformers can be written."
    )


def _model_output(name: str) -> Any:
    from transformers import modeling_outputs
    from transformers.utils.generic import ModelOutput

    found = getattr(modeling_outputs, name, None)
    is_output = isinstance(found, type) and issubclass(found, ModelOutput)
    return found if is_output else None


def _read_output(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    leaves: Sequence[Any] = [
        torch.empty(leaf["shape"], device="meta")
        if isinstance(leaf, dict) and "shape" in leaf
        else _read_leaf(leaf, tensors)
        for leaf in described["leaves"]
    ]

    def read(tree: Any) -> Any:
        if isinstance(tree, int):
            return leaves[tree]
        if "class" in tree:
            return _model_output(tree["class"])(**{k: read(t) for k, t in tree["fields"].items()})
        ((kind, inner),) = tree.items()
        if kind == "dict":
            return {k: read(t) for k, t in inner.items()}
        return {"tuple": tuple, "list": list}[kind]([read(t) for t in inner])

    return read(described["structure"])

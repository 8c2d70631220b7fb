"""Writing a model for two parties: the float remainder for a client, the circuits for a server.

Where a client's weights would tell weights of an encrypted part, nothing is written.
"""

from __future__ import annotations

import hashlib
import re
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, fx, nn

from fhe_fx.errors import ArtifactError, TargetError
from fhe_fx.export.artifact import FILES
from fhe_fx.export.bundle import CIRCUITS
from fhe_fx.export.card import model_card
from fhe_fx.export.directory import new_directory
from fhe_fx.export.manifest import (
    CLIENT_MODEL_FORMAT,
    MODEL_FORMAT,
    SCHEMA,
    file_entries,
    versions,
    write_manifest,
)
from fhe_fx.export.quiet import quiet_transformers
from fhe_fx.export.region import write_region
from fhe_fx.export.stand_in import client_tensors, stand_in_files
from fhe_fx.ir import dialect as d
from fhe_fx.passes.partition import PREFIX
from fhe_fx.runtime.client import ClientModule
from fhe_fx.runtime.module import EncryptedModule
from fhe_fx.runtime.region import Region
from fhe_fx.runtime.standin import StandIn
from fhe_fx.runtime.whole import Call

__all__ = ["WEIGHTS", "is_pretrained", "save", "save_for_two"]

WEIGHTS = "model.safetensors"
_TELLING = 8
"""Fewer equal numbers are a coincidence, such as a scale or a short bias of zeros."""


@dataclass(frozen=True)
class _Part:
    """One encrypted part, and where the model holds it."""

    circuits: tuple[EncryptedModule, ...]
    """What stands there, for each of its circuits."""
    paths: tuple[str, ...]

    def directories(self) -> dict[str, EncryptedModule]:
        """Return a name of its own for the directory of each circuit, by length if it has many."""
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", self.circuits[0].region.circuit_name)
        if len(self.circuits) == 1:
            return {name: self.circuits[0]}
        return {f"{name}-{circuit.region.tokens}": circuit for circuit in self.circuits}


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    accuracy: Mapping[str, float] | None = None,
    validate: bool = True,
    origin: str = "",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Write a model with encrypted parts as `client` and `server`, for two parties.

    `client` holds the float remainder (safetensors, and config.json of a transformers model), the
    encodings of what is encrypted, and a model card, but no weight of an encrypted part. It is read
    by `fhe_fx.from_pretrained`. `server` holds a circuit for each part and is served by
    `fhe-fx serve`. Beside them stands, for the one who exports, each part as an artefact that runs
    without the model: at the top, or in `circuits` if there are several.

    Of a model that is encrypted as a whole, the tables of its embeddings remain: they are the
    client's, beside the encodings.

    The directory appears when all of it is written and validated; after an error it is as it was.

    Args:
        model: returned by `encrypt_submodule`; compiled here unless it is already.
        directory: new, empty, or written by an export, which is replaced.
        tokenizer: of the model; its `save_pretrained` adds it to `client`.
        accuracy: figures for the model card by what they are, as in {"same next token": 0.95}.
        validate: reload each circuit, and compare it on calibration samples.
        origin: where the model comes from, for manifest and card.
        on_stage: told what is being done, in a few words.

    Returns:
        The manifest at the top: of the artefact of the one part, or a list of several.

    Raises:
        TargetError: if the model has no encrypted part.
        ArtifactError: if the directory holds something else, if the client's weights would tell
            weights of an encrypted part, or if a circuit does not compute what was compiled.
        BitWidthError: if a part cannot be compiled.
    """
    parts, remainder = _apart(model)
    circuits = {name: c for part in parts for name, c in part.directories().items()}
    with new_directory(directory, FILES) as partial:
        client, manifests = partial / "client", {}
        for name, circuit in circuits.items():
            own = client / CIRCUITS / name
            home = partial if len(circuits) == 1 else partial / CIRCUITS / name
            home.mkdir(parents=True, exist_ok=True)
            handed = {"client": own, "server": partial / "server" / name}
            manifests[name] = write_region(
                circuit.region, home, handed, validate, origin=origin, on_stage=on_stage
            )
            for file, content in stand_in_files(circuit).items():
                (own / file).write_bytes(content)
        on_stage("writing the client's model")
        _write_client(model, remainder, tokenizer, client)
        card = model_card(
            type(model).__name__,
            list(manifests.values()),
            accuracy or {},
            Path(origin).name,
            _loading(model),
        )
        (client / "README.md").write_text(card, encoding="utf-8")
        write_manifest(client, _client_manifest(model, parts, client))
        is_one = len(manifests) == 1
        manifest = manifests.popitem()[1] if is_one else _model_manifest(model, manifests)
        manifest["files"] = file_entries(partial)
        write_manifest(partial, manifest)
    return manifest


def check_apart(model: nn.Module) -> None:
    """Check, before a model is compiled, that `save` can write it for two parties.

    Args:
        model: returned by `encrypt_submodule`.

    Raises:
        ArtifactError: if the client's weights would tell weights of an encrypted part.
    """
    _apart(model)


def _apart(model: nn.Module) -> tuple[list[_Part], dict[str, Tensor]]:
    """Return the encrypted parts, and the weights that are the client's."""
    parts = _parts(model)
    remainder = _remainder(model, parts)
    _refuse_telling(parts, remainder)
    return parts, remainder


def save_for_two(model: nn.Module) -> None:
    """Let `model.save_pretrained(DIR)` write client and server apart, as `save` does.

    What transformers would write of a model with encrypted parts is the float model, their weights
    and all, in one directory.
    """
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = types.MethodType(save, model)


def is_pretrained(model: object) -> bool:
    """Say whether a model, or a class, is of transformers, and so can be made from a config."""
    cls = model if isinstance(model, type) else type(model)
    return hasattr(cls, "save_pretrained") and hasattr(cls, "config_class")


def _parts(model: nn.Module) -> list[_Part]:
    found: dict[StandIn, list[str]] = {}
    if (call := _call_of(model)) is not None:
        found[call.stand_in] = [""]
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StandIn):
            found.setdefault(module, []).append(name)
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no encrypted part. Use the model that "
            f"fhe_fx.encrypt_submodule returned; it leaves the one it is given as it was."
        )
    if any(isinstance(circuit, ClientModule) for module in found for circuit in module.parts):
        raise ArtifactError(
            f"This {type(model).__name__} was loaded from a client's directory, without the "
            f"weights of its encrypted parts. Copy that directory instead."
        )
    if call is None and "" in next(iter(found.values())):
        raise ArtifactError("The whole model is encrypted, so there is no client's part to write.")
    return [_Part(module.parts, tuple(paths)) for module, paths in found.items()]


def _call_of(model: nn.Module) -> Call | None:
    """Return the `forward` of a model of which all is encrypted."""
    call = model.__dict__.get("forward")
    return call if isinstance(call, Call) else None


def _is_inside(name: str, parts: Sequence[_Part]) -> bool:
    return any(name.startswith(f"{path}.") or not path for part in parts for path in part.paths)


def _remainder(model: nn.Module, parts: Sequence[_Part]) -> dict[str, Tensor]:
    """Return the weights that are the client's."""
    state = model.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ArtifactError(f"The state {odd[0]} of the model is no tensor; it cannot be written.")
    return {name: value for name, value in state.items() if not _is_inside(name, parts)}


def _refuse_telling(parts: Sequence[_Part], remainder: Mapping[str, Tensor]) -> None:
    """Refuse to give a client what is, or equals, a weight of an encrypted part."""
    memory = {_place(value): name for name, value in remainder.items() if value.numel()}
    content = {_content(value): name for name, value in remainder.items()}
    for circuit in (circuit for part in parts for circuit in part.circuits):
        region, written = circuit.region, client_tensors(circuit)
        # Of a part of which some heads are encrypted, the client holds the others' weights.
        is_whole = region.circuit_name == region.name
        told = {_content(v): k for k, v in written.items()} if is_whole else {}
        weights = circuit.original.state_dict()
        for own in _own(region, weights):
            told.pop(own, None)
        for name, weight in weights.items():
            if not isinstance(weight, Tensor) or weight.numel() == 0:
                continue
            key = _content(weight)
            same = memory.get(_place(weight)) or (key and ({**told, **content}).get(key))
            if same:
                raise ArtifactError(
                    f"{region.name}.{name} is encrypted, and the client's part holds the same "
                    f"numbers as {same}: whoever has the one has the other. Encrypt the part that "
                    f"owns {same} too, untie the two, or encrypt another part."
                )


def _own(region: Region, weights: Mapping[str, Any]) -> set[str]:
    """Return the contents of weights that the client computes with, and the circuit does not.

    The tables of an embedding are the client's, unless the server has them too, as those to which a
    head is tied.
    """
    prefix = getattr(region.composed, PREFIX, None)
    if not isinstance(prefix, fx.GraphModule):
        return set()
    named = Counter(_content(w) for w in weights.values() if isinstance(w, Tensor))
    servers = _contents_of(region.captured.module)
    return {c for c in _contents_of(prefix) if c not in servers and named[c] == 1}


def _contents_of(graph: fx.GraphModule) -> set[str]:
    found = (_content(d.constant(n)) for n in graph.graph.nodes if n.op == "get_attr")
    return {content for content in found if content is not None}


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _content(value: Tensor) -> str | None:
    """Return a name of a tensor's numbers in any order of axes and precision; None if few."""
    flat = value.detach().to("cpu", torch.float32).reshape(-1).sort().values
    if len(flat.unique()) < _TELLING or not value.is_floating_point():
        return None
    return hashlib.sha256(flat.to(torch.bfloat16).float().numpy().tobytes()).hexdigest()


def _write_client(
    model: nn.Module, remainder: dict[str, Tensor], tokenizer: Any, client: Path
) -> None:
    if is_pretrained(model) and _call_of(model) is not None:  # no weight remains
        held: Any = model
        held.config.save_pretrained(client)
        if held.can_generate():
            held.generation_config.save_pretrained(client)
    elif is_pretrained(model):
        cls: Any = type(model)
        with quiet_transformers():
            cls.save_pretrained(model, client, state_dict=remainder)
    else:
        owned = {
            name: value.detach().cpu().contiguous().clone() for name, value in remainder.items()
        }
        safetensors.save_file(owned, client / WEIGHTS)
    if tokenizer is not None:
        tokenizer.save_pretrained(client)


def _loading(model: nn.Module) -> str:
    skeleton = "" if is_pretrained(model) else f", model={type(model).__name__}(...)"
    run = "model(inputs)"
    if hasattr(model, "generate"):
        run = "model.generate(**prompt, max_new_tokens=1)"
        if _call_of(model) is not None:
            run = "list(fhe_fx.generate(model, prompt, max_new_tokens=1))"
    return f'model = fhe_fx.from_pretrained("client"{skeleton}, remote="http://HOST:PORT")\n{run}'


def _client_manifest(model: nn.Module, parts: Sequence[_Part], client: Path) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {
        "format": CLIENT_MODEL_FORMAT,
        "schema": SCHEMA,
        "versions": versions(),
        "class": type(model).__name__,
        "is_pretrained": is_pretrained(model),
        "attention": getattr(config, "_attn_implementation", None),
        "parts": [{"paths": list(p.paths), "circuits": list(p.directories())} for p in parts],
        "files": file_entries(client),
    }


def _model_manifest(model: nn.Module, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "format": MODEL_FORMAT,
        "schema": SCHEMA,
        "versions": versions(),
        "class": type(model).__name__,
        "origin": next(iter(manifests.values()))["origin"],
        "circuits": [
            {"name": manifest["name"], "directory": f"{CIRCUITS}/{name}"}
            for name, manifest in manifests.items()
        ],
        "files": {},
    }

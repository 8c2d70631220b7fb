"""Loading a client's model: the float remainder, and a stand-in for each part that is elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import nn

from fhe_fx.errors import ArtifactError
from fhe_fx.export.bundle import CIRCUITS, load_client_bundle
from fhe_fx.export.manifest import CLIENT_MODEL_FORMAT, MANIFEST, check_files, read_manifest
from fhe_fx.export.model import WEIGHTS, is_pretrained, save_for_two
from fhe_fx.export.quiet import quiet_transformers
from fhe_fx.export.stand_in import STAND_IN_FILES, client_module
from fhe_fx.runtime.ladder import Ladder
from fhe_fx.runtime.standin import StandIn
from fhe_fx.runtime.whole import called_as

__all__ = ["client_directory", "load_client_model"]


def load_client_model(directory: str | Path, model: nn.Module | type | None = None) -> nn.Module:
    """Load the client's side of a model that `save` wrote.

    Args:
        directory: `client` of what was written, or the directory that holds it.
        model: an instance of the architecture, with any weights, which is left as it is; or a
            class of transformers' kind. Not needed for the models that transformers has itself.

    Returns:
        The model, in which each encrypted part is a `ClientModule` in mode "disable".

    Raises:
        ArtifactError: if a file is missing, truncated, altered or of another version, or if the
            architecture is another.
    """
    directory = client_directory(directory)
    manifest = read_manifest(directory, format=CLIENT_MODEL_FORMAT)
    check_files(directory, manifest)
    if manifest["parts"] and all(part["paths"] == [""] for part in manifest["parts"]):
        return _whole(directory, manifest, model)
    loaded, missing = _loaded(directory, manifest, model)
    paths = [path for part in manifest["parts"] for path in part["paths"]]
    absent = [name for name in missing if not name.startswith(tuple(f"{p}." for p in paths))]
    if absent:
        raise ArtifactError(
            f"{directory} holds no {absent[0]}, which {type(loaded).__name__} has. Load it into "
            f"the architecture that was saved, a {manifest['class']}."
        )
    for part in manifest["parts"]:
        stand_in = _stand_in(directory, part, _submodule(loaded, part["paths"][0]))
        for path in part["paths"]:
            parent, _, name = path.rpartition(".")
            _submodule(loaded, parent)._modules[name] = stand_in
    save_for_two(loaded)  # which refuses: half of it is elsewhere
    return loaded.eval()


def _whole(directory: Path, manifest: dict[str, Any], model: nn.Module | type | None) -> nn.Module:
    """Return a model without weights, all of which runs elsewhere."""
    (part,) = manifest["parts"]
    if isinstance(model, nn.Module):
        skeleton = copy.deepcopy(model)
    else:
        cls = _class(directory, manifest, model)
        with quiet_transformers(), torch.device("meta"):  # nothing is kept of its weights
            skeleton = cls(cls.config_class.from_pretrained(directory, local_files_only=True))
        if (directory / "generation_config.json").is_file():
            from transformers import GenerationConfig

            skeleton.generation_config = GenerationConfig.from_pretrained(directory)
    loaded = called_as(skeleton, _stand_in(directory, part, skeleton))
    save_for_two(loaded)  # which refuses: all of it is elsewhere
    return loaded.eval()


def _stand_in(directory: Path, part: dict[str, Any], skeleton: nn.Module) -> StandIn:
    circuits = []
    for name in part["circuits"]:
        folder = directory / CIRCUITS / str(name)
        files = {file: (folder / file).read_bytes() for file in STAND_IN_FILES}
        circuits.append(client_module(skeleton, files, load_client_bundle(folder).codec))
    return circuits[0] if len(circuits) == 1 else Ladder(skeleton, circuits)


def client_directory(directory: str | Path) -> Path:
    """Return a client's directory: the one given, or the one that it holds."""
    directory = Path(directory)
    inner = directory / "client"
    return inner if (inner / MANIFEST).is_file() else directory


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ArtifactError(
            f"{type(model).__name__} has no {path}, which is encrypted in the model that was "
            f"saved. Load it into the same architecture."
        ) from error


def _loaded(
    directory: Path, manifest: dict[str, Any], model: nn.Module | type | None
) -> tuple[nn.Module, list[str]]:
    """Return a model with the weights that are there, and the names of those that are not."""
    if isinstance(model, nn.Module):
        return _into(copy.deepcopy(model), directory, manifest)
    cls = _class(directory, manifest, model)
    with quiet_transformers():
        loaded, found = cls.from_pretrained(
            directory,
            local_files_only=True,
            output_loading_info=True,
            attn_implementation=manifest["attention"],
        )
    return loaded, list(found["missing_keys"])


def _class(directory: Path, manifest: dict[str, Any], model: type | None) -> Any:
    """Return the class of transformers' kind that a model is made of."""
    cls: Any = model
    if cls is None and manifest["is_pretrained"]:
        import transformers

        cls = getattr(transformers, str(manifest["class"]), None)
    if not (isinstance(cls, type) and is_pretrained(cls)):
        raise ArtifactError(
            f"{directory} holds the weights of a {manifest['class']}, whose architecture cannot be "
            f"made from files. Give an instance: model={manifest['class']}(...)."
        )
    return cls


def _into(
    model: nn.Module, directory: Path, manifest: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    state: dict[str, torch.Tensor] = {}
    for name in manifest["files"]:
        if "/" not in name and name.endswith(Path(WEIGHTS).suffix):
            state |= safetensors.load_file(directory / name)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ArtifactError(
            f"The weights in {directory} do not fit {type(model).__name__}: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    if unexpected:
        raise ArtifactError(
            f"{directory} holds {unexpected[0]}, which {type(model).__name__} does not have. Load "
            f"it into the architecture that was saved, a {manifest['class']}."
        )
    return model, _not_tied(model, missing, state)


def _not_tied(model: nn.Module, missing: list[str], state: dict[str, torch.Tensor]) -> list[str]:
    """Leave out what is loaded under another name."""
    held = model.state_dict(keep_vars=True)
    known = {id(held[name]) for name in state}
    return [name for name in missing if id(held[name]) not in known]

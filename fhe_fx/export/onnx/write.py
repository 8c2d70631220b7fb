"""A directory of ONNX models: what the client runs in float, and the circuit in integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fhe_fx.capture import capture
from fhe_fx.errors import TargetError
from fhe_fx.export.directory import new_directory
from fhe_fx.export.manifest import ONNX_FORMAT, SCHEMA, file_entry, versions, write_manifest
from fhe_fx.export.onnx.floats import float_models
from fhe_fx.export.onnx.integers import integer_model
from fhe_fx.export.onnx.model import IR_VERSION, OPSET
from fhe_fx.export.onnx.remainder import remainder
from fhe_fx.export.onnx.validate import validate_models
from fhe_fx.ir.program import Program
from fhe_fx.report.machine import installed_version
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.region import Region
from fhe_fx.runtime.standin import encrypted_modules

__all__ = ["AFTER", "BEFORE", "INTEGERS", "ONNX_FILES", "export_onnx", "write_onnx"]

BEFORE, AFTER, INTEGERS = "client/before.onnx", "client/after.onnx", "server/region.onnx"
ONNX_FILES = (BEFORE, AFTER, INTEGERS)
"""The files of a directory of ONNX models beside its manifest, by who is to have them."""


def export_onnx(model: nn.Module, directory: str | Path, **choices: Any) -> dict[str, Any]:
    """Write a model with one encrypted part as three ONNX models.

    Args:
        model: returned by `encrypt_submodule`; nothing is compiled.
        directory: new, empty, or of an earlier export, which is replaced.
        choices: as `write_onnx` takes them.

    Returns:
        The manifest.

    Raises:
        TargetError: if the model has no encrypted part, or more than one.
        BackendError: if a part of the rest of the model has no ONNX counterpart, or ONNX Runtime
            does not compute what PyTorch does.
        ArtifactError: if the directory holds something else.
    """
    modules = encrypted_modules(model)
    if len(modules) > 1:
        paths = ", ".join(m.region.name for m in modules)
        raise TargetError(
            f"{type(model).__name__} has {len(modules)} encrypted parts ({paths}); an ONNX export "
            f"holds one. Encrypt each in a model of its own."
        )
    region = modules[0].region
    mode, modules[0].mode = modules[0].mode, "disable"
    try:
        assert region.call is not None, "encrypt_submodule did not say what it captured"
        whole = capture(model, region.call.args, region.call.kwargs, [region.name])
    finally:
        modules[0].mode = mode
    return write_onnx(whole, region, directory, **choices)


def write_onnx(
    whole: Program,
    region: Region,
    directory: str | Path,
    *,
    origin: str = "",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Write a captured model with one encrypted part as three ONNX models.

    `client/before.onnx` and `client/after.onnx` are the model's float remainder, with encoding and
    decoding; `server/region.onnx` is the encrypted part's integer program. They are validated with
    ONNX Runtime before the directory appears; after an error it is as it was.

    Args:
        whole: the captured model with the region's arguments marked; left as it is.
        region: lowered from it.
        directory: new, empty, or of an earlier export, which is replaced.
        origin: the model that the region comes from, for the manifest.
        on_stage: told what is being done, in two words.

    Returns:
        The manifest.

    Raises:
        BackendError: if a part of the rest of the model has no ONNX counterpart, or ONNX Runtime
            does not compute what PyTorch does.
        ArtifactError: if the directory holds something else.
    """
    with new_directory(directory, ONNX_FILES, format=ONNX_FORMAT) as partial:
        on_stage("writing ONNX")
        halves = remainder(whole, region)
        before, after = float_models(halves, region)
        models = {BEFORE: before, AFTER: after, INTEGERS: integer_model(region.program)}
        files = {
            name: model.SerializeToString(deterministic=True) for name, model in models.items()
        }
        on_stage("validating ONNX")
        checked = validate_models(region, halves, *(files[name] for name in ONNX_FILES))
        for name, content in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        manifest = _manifest(region, origin, files, checked)
        write_manifest(partial, manifest)
    return manifest


def _manifest(
    region: Region, origin: str, files: dict[str, bytes], validation: dict[str, Any]
) -> dict[str, Any]:
    codec = Codec.of(region.program)
    packages = ("onnx", "onnxruntime", "onnxscript")
    return {
        "format": ONNX_FORMAT,
        "schema": SCHEMA,
        "versions": {**versions(), **{p: installed_version(p) for p in packages}},
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "origin": origin,
        "name": region.program.name,
        "module_path": region.name,
        "options": region.program.options.as_dict(),
        "passes": [p.name for p in region.pipeline],
        "pipeline": str(region.pipeline),
        "encodings": {
            "inputs": [p.summary() for p in codec.inputs],
            "results": [p.summary() for p in codec.results],
        },
        "validation": validation,
        "files": {name: file_entry(content) for name, content in files.items()},
    }

"""The manifest of an artefact: what it is, what made it, and the sha256 of every file in it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from fhe_fx.errors import ArtifactError
from fhe_fx.report.machine import installed_version

__all__ = [
    "CLIENT_FORMAT",
    "CLIENT_MODEL_FORMAT",
    "FORMAT",
    "MANIFEST",
    "MODEL_FORMAT",
    "ONNX_FORMAT",
    "SCHEMA",
    "SERVER_FORMAT",
    "check_files",
    "checked_file",
    "file_entries",
    "file_entry",
    "machine",
    "read_artefacts",
    "read_manifest",
    "read_stated",
    "stated_format",
    "versions",
    "write_manifest",
]

MANIFEST = "manifest.json"
FORMAT, CLIENT_FORMAT, SERVER_FORMAT = (
    "fhe_fx artifact",
    "fhe_fx client bundle",
    "fhe_fx server bundle",
)
"""What a directory is: the whole, for who exports, and the two parts that are handed out."""
MODEL_FORMAT, CLIENT_MODEL_FORMAT = "fhe_fx model", "fhe_fx client model"
"""A model of which several parts were exported, and what a client gets of it, of one or several."""
ONNX_FORMAT = "fhe_fx ONNX export"
_FORMATS = (
    FORMAT,
    CLIENT_FORMAT,
    SERVER_FORMAT,
    MODEL_FORMAT,
    CLIENT_MODEL_FORMAT,
    ONNX_FORMAT,
)
SCHEMA = 2
_MAX_MANIFEST = 64 << 20
_PACKAGES = ("fhe_fx", "torch", "concrete-python", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of what makes and runs a circuit here."""
    return {"python": platform.python_version(), **{p: installed_version(p) for p in _PACKAGES}}


def machine() -> dict[str, str]:
    """Return what machine code made here runs on."""
    return {"system": platform.system(), "architecture": platform.machine()}


def file_entry(content: bytes) -> dict[str, Any]:
    """Return size and sha256 of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def file_entries(directory: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file below a directory but its own manifest, by path."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)
    return {
        p.relative_to(directory).as_posix(): {"bytes": p.stat().st_size, "sha256": _digest_of(p)}
        for p in paths
    }


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest, with a sha256 of its own content."""
    content = {**manifest, "sha256": _digest(manifest)}
    (directory / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _digest(manifest: dict[str, Any]) -> str:
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(
    directory: Path, *, check_versions: bool = True, format: str = FORMAT
) -> dict[str, Any]:
    """Read the manifest of an artefact and check that this installation can use it.

    Args:
        directory: the artefact.
        check_versions: whether it is to be run, not only read.
        format: what the directory must be.

    Raises:
        ArtifactError: if there is none, or it is truncated, altered, or of another version.
    """
    manifest = _parse(directory, format)
    if manifest["schema"] != SCHEMA:
        raise ArtifactError(
            f"{directory} has schema version {manifest['schema']}; this fhe_fx reads version "
            f"{SCHEMA}. Export the region again, or install the fhe_fx that wrote it "
            f"({_version_of(manifest, 'fhe_fx')})."
        )
    if check_versions:
        _check_versions(directory, manifest)
    if manifest.get("sha256") != _digest(manifest):
        raise ArtifactError(
            f"{directory / MANIFEST} was altered: its sha256 is not the one that it states. "
            f"Export the region again."
        )
    return manifest


def read_stated(directory: Path, *, check_versions: bool = True) -> dict[str, Any]:
    """Read the manifest of an artefact, or of a model of which several parts were exported.

    Raises:
        ArtifactError: as `read_manifest`.
    """
    is_model = stated_format(directory) == MODEL_FORMAT
    return read_manifest(
        directory, check_versions=check_versions, format=MODEL_FORMAT if is_model else FORMAT
    )


def read_artefacts(directory: Path, *, check_versions: bool = True) -> list[dict[str, Any]]:
    """Read the manifest of an artefact, or those of all circuits of a model.

    Raises:
        ArtifactError: as `read_manifest`.
    """
    stated = read_stated(directory, check_versions=check_versions)
    if stated["format"] == FORMAT:
        return [stated]
    names = [str(circuit["directory"]) for circuit in stated["circuits"]]
    return [read_manifest(directory / name, check_versions=check_versions) for name in names]


def stated_format(directory: Path) -> str | None:
    """Return what a directory says that it is; None if it does not say."""
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST:
            return None
        return str(json.loads(path.read_bytes())["format"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _parse(directory: Path, format: str) -> dict[str, Any]:
    path = directory / MANIFEST
    if not directory.is_dir():
        raise ArtifactError(f"There is no directory {directory}.")
    if not path.is_file():
        raise ArtifactError(
            f"{directory} has no {MANIFEST}; it is not an artefact. "
            f"Make one with: fhe-fx export MODEL --submodule ... --out {directory}"
        )
    if path.stat().st_size > _MAX_MANIFEST:
        raise ArtifactError(f"{path} has {path.stat().st_size:,} bytes; it is not a manifest.")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is truncated or altered: it is not JSON ({error}). Export the region again."
        ) from error
    stated = manifest.get("format") if isinstance(manifest, dict) else None
    if stated in _FORMATS and stated != format:
        raise ArtifactError(f"{directory} is an {stated}; an {format} is needed here.")
    if not isinstance(manifest, dict) or stated != format:
        raise ArtifactError(f"{path} is not the manifest of an fhe_fx artefact.")
    if not isinstance(manifest.get("schema"), int):
        raise ArtifactError(f"{path} was altered: it states no schema version.")
    return manifest


def _version_of(manifest: dict[str, Any], package: str) -> str:
    stated = manifest.get("versions")
    return str(stated.get(package, "unknown")) if isinstance(stated, dict) else "unknown"


def _check_versions(directory: Path, manifest: dict[str, Any]) -> None:
    """Refuse an artefact whose machine code or meaning may differ here."""
    for package in ("fhe_fx", "concrete-python", "torch"):
        theirs, ours = _version_of(manifest, package), versions()[package]
        if theirs.split(".")[0] != ours.split(".")[0]:
            raise ArtifactError(
                f"{directory} was made with {package} {theirs}; here is {package} {ours}. "
                f"Export the region again, or install {package} {theirs}."
            )
    if (theirs_on := manifest.get("machine", machine())) != machine():
        raise ArtifactError(
            f"{directory} holds machine code for {theirs_on}; this machine is {machine()}. "
            f"Export the region here."
        )


def checked_file(directory: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """Read a file of an artefact whole, after checking its size, and check its sha256.

    Raises:
        ArtifactError: if it is missing, truncated or altered.
    """
    check_files(directory, manifest, [name])
    return (directory / name).read_bytes()


def check_files(
    directory: Path, manifest: dict[str, Any], names: Iterable[str] | None = None
) -> None:
    """Check size and sha256 of the files that a manifest lists, or of some of them.

    Raises:
        ArtifactError: names one that is missing, truncated, altered or elsewhere.
    """
    for name in manifest["files"] if names is None else names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactError(f"{directory / MANIFEST} was altered: it lists {name!r}.")
        _check_file(directory / name, manifest["files"][name])


def _check_file(path: Path, stated: dict[str, Any]) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing. Export the region again.")
    size = path.stat().st_size
    if size != stated["bytes"]:
        word = "truncated" if size < stated["bytes"] else "altered"
        raise ArtifactError(
            f"{path} is {word}: it has {size:,} bytes, {stated['bytes']:,} were written. "
            f"Export the region again."
        )
    if _digest_of(path) != stated["sha256"]:
        raise ArtifactError(
            f"{path} was altered: its sha256 is not the one in {MANIFEST}. Export the region again."
        )


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

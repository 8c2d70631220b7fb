"""A directory that appears whole or not at all, and replaces nothing but an artefact."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from fhe_fx.errors import ArtifactError
from fhe_fx.export.manifest import FORMAT, MANIFEST, MODEL_FORMAT, read_manifest, stated_format

__all__ = ["check_destination", "new_directory"]


def check_destination(
    directory: str | Path, files: Collection[str], *, format: str = FORMAT
) -> None:
    """Check that an artefact may be written to `directory`.

    Args:
        directory: where; missing parents are made when it is written.
        files: paths in it of the files of an artefact beside its manifest.
        format: what the directory is, as its manifest says.

    Raises:
        ArtifactError: if it is a file, or holds anything but an artefact of ours.
    """
    directory = Path(directory).resolve()
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    if existing != directory and not existing.is_dir():
        raise ArtifactError(f"{existing} is a file, so {directory} cannot be made in it.")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is a file; give the name of a directory.")
    if not any(directory.iterdir()):
        return
    known = {str(p) for name in (MANIFEST, *files, *_listed(directory)) for p in _path_to(name)}
    held = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*"))
    if extra := [name for name in held if name not in known]:
        raise ArtifactError(
            f"{directory} holds {extra[0]!r}, which no export wrote, so it is not replaced. "
            f"Give another directory."
        )
    if format == FORMAT and stated_format(directory) == MODEL_FORMAT:
        format = MODEL_FORMAT
    try:
        read_manifest(directory, check_versions=False, format=format)
    except ArtifactError as error:
        raise ArtifactError(f"{directory} is not replaced: {error}") from error


def _listed(directory: Path) -> list[str]:
    """Return the paths that a manifest lists, if there is one that can be read."""
    try:
        return [str(name) for name in json.loads((directory / MANIFEST).read_bytes())["files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _path_to(name: str) -> list[PurePosixPath]:
    path = PurePosixPath(name)
    return [path, *path.parents]


@contextlib.contextmanager
def new_directory(
    directory: str | Path, files: Collection[str], *, format: str = FORMAT
) -> Iterator[Path]:
    """Give a directory to write to, which becomes `directory` if nothing fails.

    Args:
        directory: as `check_destination` accepts.
        files: paths in it of the files of an artefact beside its manifest.
        format: what the directory is, as its manifest says.
    """
    final = Path(directory).resolve()
    check_destination(final, files, format=format)
    token = secrets.token_hex(4)
    partial = final.with_name(f".{final.name}.partial-{token}")
    partial.mkdir(parents=True)
    try:
        yield partial
        check_destination(final, files, format=format)
        _put(partial, final, final.with_name(f".{final.name}.old-{token}"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, final: Path, old: Path) -> None:
    if not final.exists() or not any(final.iterdir()):
        os.replace(partial, final)  # an empty directory is replaced
        return
    os.rename(final, old)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)

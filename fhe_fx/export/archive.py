"""Zip files with a known list of entries: written reproducibly, read within bounds."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection, Mapping

from fhe_fx.errors import ArtifactError

__all__ = ["MAX_BYTES", "pack", "unpack"]

MAX_BYTES = 4 << 30
"""Most that the entries of one archive may hold together, unpacked."""

_DATE = (1980, 1, 1, 0, 0, 0)  # the same entries give the same bytes, and so the same sha256


def pack(entries: Mapping[str, bytes]) -> bytes:
    """Return a zip file that holds `entries`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name, _DATE)
            info.external_attr = 0o644 << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def unpack(name: str, content: bytes, known: Collection[str]) -> dict[str, bytes]:
    """Return the entries of a zip file, which must be exactly `known`.

    Args:
        name: how messages call the file.
        content: the file.
        known: the names that it must have, none of them with a path.

    Raises:
        ArtifactError: if it is no zip file, has other entries, or unpacks to more than MAX_BYTES.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check_entries(name, archive.infolist(), known)
            return {info.filename: archive.read(info) for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ArtifactError(f"{name} is not a zip file that can be read: {error}.") from error


def _check_entries(name: str, infos: list[zipfile.ZipInfo], known: Collection[str]) -> None:
    names = [info.filename for info in infos]
    if sorted(names) != sorted(known):
        extra = sorted(set(names) - set(known))
        missing = sorted(set(known) - set(names))
        raise ArtifactError(
            f"{name} holds {len(names)} entries that are not the {len(known)} expected"
            f"{f'; unexpected: {extra[0]!r}' if extra else ''}"
            f"{f'; missing: {missing[0]!r}' if missing else ''}. Export the region again."
        )
    if (total := sum(info.file_size for info in infos)) > MAX_BYTES:
        raise ArtifactError(f"{name} unpacks to {total:,} bytes; at most {MAX_BYTES:,} are read.")

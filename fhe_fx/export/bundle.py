"""The two parts of an artefact, each for one party: what a client needs, and what a server needs.

A client's bundle holds the scales of inputs and results and Concrete's specification of keys and
shapes; a server's holds machine code and the integer program. Both state one bundle id, by which
the parties know that they speak of the same export.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fhe_fx.errors import ArtifactError
from fhe_fx.export.archive import unpack
from fhe_fx.export.artifact import (
    CLIENT_ENTRIES,
    DRAWN,
    EXECUTION_FILES,
    SERVER_ENTRIES,
    SPECS,
)
from fhe_fx.export.manifest import (
    CLIENT_FORMAT,
    CLIENT_MODEL_FORMAT,
    MANIFEST,
    SERVER_FORMAT,
    check_files,
    checked_file,
    file_entry,
    read_manifest,
    stated_format,
)
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.region import Region

__all__ = [
    "CIRCUITS",
    "ClientBundle",
    "ServerBundle",
    "bundle_id",
    "load_client_bundle",
    "load_client_bundles",
    "load_server_bundle",
    "party_manifest",
]

CIRCUITS = "circuits"
"""Directory of a client's model that holds a bundle for each part."""
_FORMATS = {"client": CLIENT_FORMAT, "server": SERVER_FORMAT}
_SHARED = ("schema", "versions", "name", "module_path", "heads", "inputs", "results", "bundle")
_COSTS = ("look_ups", "complexity", "key_bytes", "input_bytes", "output_bytes", "p_error")


@dataclass(frozen=True)
class ClientBundle:
    """What a client has of a circuit."""

    manifest: dict[str, Any]
    """Names, shapes, cost, bundle id."""
    specs: bytes
    """Concrete's specification of keys, inputs and results."""
    codec: Codec
    """Real tensors to integers, and back."""


@dataclass(frozen=True)
class ServerBundle:
    """What a server has of a circuit."""

    manifest: dict[str, Any]
    """Names, shapes, cost, bundle id."""
    files: dict[str, bytes]
    """The files that Concrete's server loads."""


def bundle_id(client: bytes, server: bytes) -> str:
    """Return the identity of an export, from its two zip files."""
    both = file_entry(client)["sha256"] + file_entry(server)["sha256"]
    return hashlib.sha256(both.encode()).hexdigest()


def party_manifest(
    party: str, manifest: Mapping[str, Any], region: Region, files: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the manifest of one party's directory, with nothing in it that is the other's.

    Args:
        party: "client" or "server".
        manifest: of the whole artefact, with its bundle id.
        region: that is exported.
        files: size and sha256 of the party's files, by name.
    """
    from fhe_fx.backends.concrete.artifact import client_specs, keyset_id, wire_format

    specs = client_specs(region.circuit())
    machine_code = {"machine": manifest["machine"]} if party == "server" else {}
    return {
        "format": _FORMATS[party],
        **{k: manifest[k] for k in _SHARED},
        **machine_code,
        "keyset": keyset_id(specs),
        "wire": wire_format(specs),
        "cost": {k: manifest["cost"][k] for k in _COSTS},
        "files": dict(files),
    }


def load_client_bundle(directory: str | Path) -> ClientBundle:
    """Read a client's directory, whose files must have the sha256 that its manifest states.

    Raises:
        ArtifactError: if a file is missing, truncated, altered, or of another version.
    """
    directory = Path(directory)
    manifest, files = _checked(directory, CLIENT_FORMAT, {"client.zip"})
    entries = unpack("client.zip", files["client.zip"], CLIENT_ENTRIES)
    return ClientBundle(manifest, entries[SPECS], Codec.from_entries(entries))


def load_client_bundles(directory: str | Path) -> dict[Path, ClientBundle]:
    """Read a client's bundle, or those of all parts of a client's model, by their directories.

    Raises:
        ArtifactError: as `load_client_bundle`.
    """
    directory = Path(directory)
    if stated_format(directory) != CLIENT_MODEL_FORMAT:
        return {directory: load_client_bundle(directory)}
    manifest = read_manifest(directory, format=CLIENT_MODEL_FORMAT)
    check_files(directory, manifest)
    names = [str(name) for part in manifest["parts"] for name in part["circuits"]]
    return {directory / CIRCUITS / n: load_client_bundle(directory / CIRCUITS / n) for n in names}


def load_server_bundle(directory: str | Path) -> ServerBundle:
    """Read a server's directory, whose files must have the sha256 that its manifest states.

    Raises:
        ArtifactError: if a file is missing, truncated, altered, or of another version.
    """
    needed = {"server.zip", "graph.txt"}
    manifest, files = _checked(Path(directory), SERVER_FORMAT, needed, optional={DRAWN})
    entries = unpack("server.zip", files["server.zip"], SERVER_ENTRIES)
    return ServerBundle(manifest, {name: entries[name] for name in EXECUTION_FILES})


def _checked(
    directory: Path, format: str, names: set[str], optional: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest = read_manifest(directory, format=format)
    listed = manifest.get("files")
    if not isinstance(listed, dict) or set(listed) - set(optional) != names:
        raise ArtifactError(
            f"{directory / MANIFEST} was altered: it does not list {', '.join(sorted(names))}."
        )
    return manifest, {name: checked_file(directory, name, manifest) for name in listed}

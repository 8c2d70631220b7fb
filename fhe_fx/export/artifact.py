"""Reading an artefact: checked whole before anything in it is parsed, then run without the model.

`server.zip` holds machine code that runs in this process. The sums in the manifest find
accidents, not malice: load only what comes from where you trust.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.errors import ArtifactError
from fhe_fx.export.archive import unpack
from fhe_fx.export.graph import GRAPH_ENTRIES, graph_from_entries
from fhe_fx.export.manifest import (
    FORMAT,
    MANIFEST,
    MODEL_FORMAT,
    check_files,
    checked_file,
    read_manifest,
    stated_format,
)
from fhe_fx.runtime.codec import CODEC_ENTRIES, Codec

if TYPE_CHECKING:
    from typing_extensions import Self

    from fhe_fx.backends.concrete.artifact import SavedCircuit

__all__ = [
    "CLIENT",
    "CLIENT_ENTRIES",
    "DRAWN",
    "EXECUTION_FILES",
    "FILES",
    "GRAPH",
    "PARTIES",
    "PARTY_FILES",
    "SERVER",
    "SERVER_ENTRIES",
    "SPECS",
    "WHOLE",
    "Artifact",
    "load_artifact",
    "read_drawn",
    "simulated",
]

CLIENT, SERVER, GRAPH = "client.zip", "server.zip", "graph.txt"
WHOLE = (CLIENT, SERVER, GRAPH)
"""What an artefact is made of, beside its manifest."""
DRAWN = "graph.json"
"""The same as graph.txt as data, from which `fhe-fx graph` draws; older artefacts have none."""
PARTY_FILES = {"client": (CLIENT,), "server": (SERVER, GRAPH, DRAWN)}
"""Which of them each party is handed."""
PARTIES = {f"{party}/{name}": name for party, names in PARTY_FILES.items() for name in names}
"""The same files in the directories that are handed to the two parties."""
FILES = (*WHOLE, DRAWN, *PARTIES, f"client/{MANIFEST}", f"server/{MANIFEST}")
"""The files of an artefact and its two bundles, beside its manifest."""

SPECS = "client.specs.json"
EXECUTION_FILES = (
    "sharedlib.so",
    "program_info.concrete.params.json",
    "compilation_feedback.json",
    "is_simulated",
    "composition_rules.json",
    SPECS,
)
CLIENT_ENTRIES = (SPECS, *CODEC_ENTRIES)


def simulated(name: str) -> str:
    """Return the name in server.zip of a file of the server that simulates."""
    return f"simulation.{name}"


SERVER_ENTRIES = (*EXECUTION_FILES, *map(simulated, EXECUTION_FILES), *GRAPH_ENTRIES)


class Artifact:
    """A circuit that was exported: it runs on real inputs of its region, without the model.

    Use it in a `with` statement, or `close` it: the server's files are unpacked to a private
    temporary directory.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        self.directory = directory
        self.manifest = manifest
        client = unpack("client.zip", files[CLIENT], CLIENT_ENTRIES)
        self._server = unpack("server.zip", files[SERVER], SERVER_ENTRIES)
        self._specs = client[SPECS]
        self.codec = Codec.from_entries(client)
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        self._loaded: SavedCircuit | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the unpacked files."""
        if self._unpacked is not None:
            self._unpacked.cleanup()
        self._unpacked = self._loaded = None

    def circuit(self) -> SavedCircuit:
        """Return the circuit, with Concrete loaded."""
        if self._loaded is None:
            from fhe_fx.backends.concrete.artifact import SavedCircuit

            self._unpacked = tempfile.TemporaryDirectory(prefix="fhe_fx-")
            folders = [Path(self._unpacked.name) / name for name in ("execution", "simulation")]
            for folder in folders:
                folder.mkdir()
            for name in EXECUTION_FILES:
                (folders[0] / name).write_bytes(self._server[name])
                (folders[1] / name).write_bytes(self._server[simulated(name)])
            self._loaded = SavedCircuit(self._specs, *folders)
        return self._loaded

    def clear(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the integer program in the clear: what the circuit means; needs no Concrete.

        Raises:
            InputError: if the inputs do not fit.
        """
        with torch.no_grad():
            circuit = ReferenceBackend().compile(graph_from_entries(self._server))
            return self.codec.decode(circuit.clear(self.codec.encode(inputs)))

    def simulate(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on integers in the clear, with the noise that encryption would add.

        Raises:
            InputError: if the inputs do not fit.
        """
        return self.codec.decode(self.circuit().simulate(self.codec.encode(inputs)))

    def execute(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Encrypt, run and decrypt; keys are made at the first call unless some were loaded.

        Raises:
            InputError: if the inputs do not fit.
        """
        return self.codec.decode(self.circuit().execute(self.codec.encode(inputs)))


def read_drawn(directory: str | Path) -> dict[str, Any]:
    """Return the snapshot of the integer program of an artefact, or of what a server was handed.

    Args:
        directory: what `export` wrote, of one part.

    Raises:
        ArtifactError: if it holds several parts, or none, or was altered.
    """
    directory = Path(directory)
    stated = stated_format(directory) or FORMAT
    manifest = read_manifest(directory, check_versions=False, format=stated)
    circuits = manifest.get("circuits", []) if stated == MODEL_FORMAT else []
    if len(circuits) == 1:
        return read_drawn(directory / str(circuits[0]["directory"]))
    if circuits:
        parts = ", ".join(str(c["directory"]) for c in circuits)
        raise ArtifactError(f"{directory} holds {len(circuits)} circuits: {parts}. Give one.")
    if DRAWN not in manifest["files"]:
        raise ArtifactError(
            f"{directory}, an {stated}, holds no {DRAWN}: the graph belongs to the server. "
            f"Give the directory that was exported, or the server's, or export again."
        )
    found = json.loads(checked_file(directory, DRAWN, manifest))
    assert isinstance(found, dict)
    return found


def load_artifact(directory: str | Path) -> Artifact:
    """Read a directory that `export_region` wrote.

    Args:
        directory: holds manifest.json and the files that it names.

    Raises:
        ArtifactError: if a file is missing, truncated or altered, or if the artefact is of another
            schema or version; says which, and both versions.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if not isinstance(manifest.get("files"), dict) or not set(WHOLE) <= set(manifest["files"]):
        raise ArtifactError(
            f"{directory / MANIFEST} was altered: it does not list {', '.join(WHOLE)}."
        )
    check_files(directory, manifest)
    files = {name: (directory / name).read_bytes() for name in WHOLE}
    return Artifact(directory, manifest, files)

"""A compiled circuit as files, without the program that it came from; and its keys in a file.

The server's files are machine code and run in this process: load only what comes from where you
trust. A file of keys holds the secret keys; it is written and read only if private to its owner.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from concrete.compiler import Library
from concrete.fhe.compilation.client import Client
from concrete.fhe.compilation.keys import Keys
from concrete.fhe.compilation.server import Server
from concrete.fhe.compilation.specs import ClientSpecs

from fhe_fx.backends.base import Integers
from fhe_fx.backends.concrete.circuit import ConcreteCircuit
from fhe_fx.errors import ArtifactError, BackendError

__all__ = ["SPECS", "SavedCircuit", "client_specs", "server_files"]

SPECS = "client.specs.json"
"""The file by which Concrete's client knows a circuit; no weights are in it."""

_KEYS_MAGIC = b"fhe_fx keys 1\n"


def client_specs(circuit: ConcreteCircuit) -> bytes:
    """Return what Concrete's client must know of a circuit."""
    return bytes(circuit._circuit.client.specs.serialize())


def server_files(circuit: ConcreteCircuit, *, is_simulated: bool) -> dict[str, bytes]:
    """Return the files of Concrete's server, as `fhe.Server.load` reads them from a zip file.

    Args:
        circuit: compiled.
        is_simulated: whether to return the server that simulates, which is compiled apart.
    """
    if is_simulated:
        circuit._circuit.enable_fhe_simulation()
    compiled = circuit._circuit.simulator if is_simulated else circuit._circuit.server
    # The static library beside the shared one is never loaded.
    names = ("sharedlib.so", "program_info.concrete.params.json", "compilation_feedback.json")
    folder = Path(compiled._library.get_output_dir_path())
    files = {name: (folder / name).read_bytes() for name in names}
    files["is_simulated"] = b"1" if is_simulated else b"0"
    files["composition_rules.json"] = b"null"
    files[SPECS] = bytes(compiled.client_specs.serialize())
    return files


class SavedCircuit:
    """A circuit that was read from files."""

    def __init__(self, specs: bytes, execution: Path, simulation: Path) -> None:
        """Prepare; nothing is loaded before it is run.

        Args:
            specs: what `client_specs` returned.
            execution: directory with the server's files.
            simulation: directory with the simulating server's files.
        """
        self._specs = specs
        self._folders = {False: execution, True: simulation}
        self._servers: dict[bool, Server] = {}
        self._clients: dict[bool, Client] = {}

    def _server(self, is_simulated: bool) -> Any:
        if is_simulated not in self._servers:
            library = Library(str(self._folders[is_simulated]))
            self._servers[is_simulated] = Server(library, is_simulated, None)
        return self._servers[is_simulated]

    def _client(self, is_simulated: bool) -> Any:
        if is_simulated not in self._clients:
            specs = ClientSpecs.deserialize(self._specs)
            self._clients[is_simulated] = Client(specs, is_simulated=is_simulated)
        return self._clients[is_simulated]

    def simulate(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Run on plain integers with modelled noise."""
        with _explained("simulate"):
            client, server = self._client(True), self._server(True)
            return _list(
                client.simulate_decrypt(server.run(*_many(client.simulate_encrypt(*inputs))))
            )

    def execute(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Encrypt, run and decrypt, with the keys made or loaded before, else with new ones."""
        with _explained("execute"):
            client, server = self._client(False), self._server(False)
            encrypted = _many(client.encrypt(*inputs))
            return _list(
                client.decrypt(server.run(*encrypted, evaluation_keys=client.evaluation_keys))
            )

    def keygen(self) -> None:
        """Make keys in memory, unless there are some."""
        with _explained("make keys for"):
            self._client(False).keygen()

    def save_keys(self, path: Path) -> None:
        """Write the secret and evaluation keys to a new file that only its owner can read.

        Raises:
            ArtifactError: if the file exists, or cannot be written.
        """
        self.keygen()
        payload = self._client(False).keys.serialize()
        header = {
            "bytes": len(payload),
            "sha256": _sha256(payload),
            "circuit": _sha256(self._specs),
        }
        try:
            _write_private(path, _KEYS_MAGIC + json.dumps(header).encode() + b"\n", payload)
        except FileExistsError as error:
            raise ArtifactError(f"{path} exists; keys are never overwritten.") from error
        except OSError as error:
            raise ArtifactError(f"Keys cannot be written to {path}: {error.strerror}.") from error

    def load_keys(self, path: Path) -> None:
        """Read keys that `save_keys` wrote for this circuit.

        Raises:
            ArtifactError: if others can read the file, or it is truncated, altered, or belongs to
                another circuit.
        """
        payload = _check_keys(path, _read_private(path), _sha256(self._specs))
        with _explained("read the keys of"):
            self._client(False).keys = Keys.deserialize(payload)


def _many(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


def _list(results: Any) -> list[Integers]:
    return [np.asarray(r, dtype=np.int64) for r in _many(results)]


@contextlib.contextmanager
def _explained(verb: str) -> Any:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackendError(f"Concrete cannot {verb} the saved circuit: {first}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_private(path: Path, *parts: bytes) -> None:
    """Write a new file of mode 0600; it appears under its name when it is whole."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
        os.link(name, path)  # unlike a rename, fails if the name is taken
    finally:
        os.unlink(name)


def _read_private(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ArtifactError(f"Keys cannot be read from {path}: {error.strerror}.") from error
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ArtifactError(f"{path} is not a regular file.")
        if mode & 0o077:
            raise ArtifactError(
                f"{path} holds secret keys and others can read it (mode {mode & 0o777:04o}). "
                f"If they are still secret: chmod 600 {path}. If not, delete it."
            )
        return file.read()


def _check_keys(path: Path, content: bytes, circuit: str) -> bytes:
    if not content.startswith(_KEYS_MAGIC):
        raise ArtifactError(f"{path} is not a file of fhe_fx keys.")
    line, _, payload = content[len(_KEYS_MAGIC) :].partition(b"\n")
    try:
        header: Mapping[str, Any] = json.loads(line)
        is_whole = len(payload) == header["bytes"] and _sha256(payload) == header["sha256"]
        is_ours = header["circuit"] == circuit
    except (ValueError, KeyError, TypeError):
        is_whole = is_ours = False
    if not is_whole:
        raise ArtifactError(f"{path} is truncated or altered. Delete it; new keys are then made.")
    if not is_ours:
        raise ArtifactError(f"{path} holds keys of another circuit. Give another file name.")
    return payload

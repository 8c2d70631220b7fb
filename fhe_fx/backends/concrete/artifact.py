"""A compiled circuit as files, without the program that it came from; and its keys in a file.

The server's files are machine code and run in this process: load only what comes from where you
trust. A file of keys holds the secret keys; it is written and read only if private to its owner.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
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
from fhe_fx.backends.keyfile import read_keys, write_keys
from fhe_fx.errors import BackendError

__all__ = [
    "SPECS",
    "SavedCircuit",
    "client_specs",
    "explained",
    "keyset_id",
    "security_bits",
    "server_files",
    "wire_format",
]

SPECS = "client.specs.json"
"""The file by which Concrete's client knows a circuit; no weights are in it."""


def client_specs(circuit: ConcreteCircuit) -> bytes:
    """Return what Concrete's client must know of a circuit."""
    return bytes(circuit._circuit.client.specs.serialize())


def security_bits(circuit: ConcreteCircuit) -> int:
    """Return the security level for which Concrete chose the parameters."""
    return int(circuit._circuit.configuration.security_level.value)


def server_files(circuit: ConcreteCircuit, *, is_simulated: bool) -> dict[str, bytes]:
    """Return the files of Concrete's server, as `fhe.Server.load` reads them from a zip file.

    Args:
        circuit: compiled.
        is_simulated: whether to return the server that simulates, which is compiled apart.
    """
    compiled = circuit.simulator() if is_simulated else circuit._circuit.server
    # The static library beside the shared one is never loaded.
    names = ("sharedlib.so", "program_info.concrete.params.json", "compilation_feedback.json")
    folder = Path(compiled._library.get_output_dir_path())
    files = {name: (folder / name).read_bytes() for name in names}
    files["is_simulated"] = b"1" if is_simulated else b"0"
    files["composition_rules.json"] = b"null"
    files[SPECS] = bytes(compiled.client_specs.serialize())
    return files


def keyset_id(specs: bytes) -> str:
    """Return the sha256 of the parameters that keys depend on: circuits that agree share keys."""
    keyset = json.loads(specs)["keyset"]
    return hashlib.sha256(json.dumps(keyset, sort_keys=True).encode()).hexdigest()


def wire_format(specs: bytes) -> dict[str, Any]:
    """Return the numbers that decide how inputs and results may be sent.

    Returns:
        "inputs": how many ciphertexts go in; "results": for each, "words": 64-bit words of its
        ciphertexts; "width": bits of the encoding, beside one bit of padding; "lwe_dimension":
        words of one ciphertext, less one.
    """
    (circuit,) = json.loads(specs)["circuits"]
    results = []
    for output in circuit["outputs"]:
        kind = output["typeInfo"]["lweCiphertext"]
        results.append(
            {
                "words": math.prod(output["rawInfo"]["shape"]["dimensions"]),
                "width": int(kind["encoding"]["integer"]["width"]),
                "lwe_dimension": int(kind["encryption"]["lweDimension"]),
            }
        )
    return {"inputs": len(circuit["inputs"]), "results": results}


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
        with explained("simulate"):
            client, server = self._client(True), self._server(True)
            return _list(
                client.simulate_decrypt(server.run(*_many(client.simulate_encrypt(*inputs))))
            )

    def execute(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Encrypt, run and decrypt, with the keys made or loaded before, else with new ones."""
        with explained("execute"):
            client, server = self._client(False), self._server(False)
            encrypted = _many(client.encrypt(*inputs))
            return _list(
                client.decrypt(server.run(*encrypted, evaluation_keys=client.evaluation_keys))
            )

    def keygen(self) -> None:
        """Make keys in memory, unless there are some."""
        with explained("make keys for"):
            self._client(False).keygen()

    def save_keys(self, path: Path) -> None:
        """Write the secret and evaluation keys to a new file that only its owner can read.

        Raises:
            ArtifactError: if the file exists, or cannot be written.
        """
        self.keygen()
        write_keys(path, self._client(False).keys.serialize(), keyset_id(self._specs))

    def load_keys(self, path: Path) -> None:
        """Read keys that `save_keys` wrote for this circuit.

        Raises:
            ArtifactError: if others can read the file, or it is truncated, altered, or belongs to
                another circuit.
        """
        payload = read_keys(path, keyset_id(self._specs))
        with explained("read the keys of"):
            self._client(False).keys = Keys.deserialize(payload)


def _many(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


def _list(results: Any) -> list[Integers]:
    return [np.asarray(r, dtype=np.int64) for r in _many(results)]


@contextlib.contextmanager
def explained(verb: str) -> Iterator[None]:
    """Turn what Concrete raises into one sentence.

    Raises:
        BackendError: in place of Concrete's own.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackendError(f"Concrete cannot {verb} the saved circuit: {first}") from error

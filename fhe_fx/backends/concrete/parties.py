"""The two halves of a saved circuit as bytes in, bytes out: a client with keys, a server without.

The server's half loads machine code and parses what strangers sent: run it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from concrete.compiler import Library
from concrete.fhe.compilation.client import Client
from concrete.fhe.compilation.evaluation_keys import EvaluationKeys
from concrete.fhe.compilation.keys import Keys
from concrete.fhe.compilation.server import Server
from concrete.fhe.compilation.specs import ClientSpecs
from concrete.fhe.compilation.value import Value

from fhe_fx.backends.base import Integers
from fhe_fx.backends.concrete.artifact import explained

__all__ = ["ConcreteClient", "ConcreteServer", "EvaluationKeys", "parse_evaluation_keys"]


class ConcreteClient:
    """Makes keys, encrypts and decrypts; knows the circuit by its specifications alone."""

    def __init__(self, specs: bytes) -> None:
        self._client = Client(ClientSpecs.deserialize(specs))

    def keygen(self) -> None:
        """Make new keys."""
        with explained("make keys for"):
            self._client.keygen(force=True)

    def secret_keys(self) -> bytes:
        """Return all keys, the secret ones among them."""
        return bytes(self._client.keys.serialize())

    def evaluation_keys(self) -> bytes:
        """Return what a server needs to run circuits, seeded: masks are sent as their seed."""
        return bytes(self._client.evaluation_keys.serialize())

    def load(self, secret_keys: bytes) -> None:
        """Take keys that `secret_keys` returned."""
        with explained("read the keys of"):
            self._client.keys = Keys.deserialize(secret_keys)

    def encrypt(self, inputs: Sequence[Integers]) -> list[bytes]:
        """Encrypt each input anew, seeded."""
        with explained("encrypt for"):
            encrypted = self._client.encrypt(*inputs)
        values = encrypted if isinstance(encrypted, tuple) else (encrypted,)
        return [bytes(v.serialize()) for v in values]

    def decrypt(self, results: Sequence[bytes]) -> list[Integers]:
        """Decrypt results of a run."""
        with explained("decrypt the results of"):
            decrypted = self._client.decrypt(*[Value.deserialize(r) for r in results])
        values = decrypted if isinstance(decrypted, tuple) else (decrypted,)
        return [np.asarray(v, dtype=np.int64) for v in values]


def parse_evaluation_keys(content: bytes) -> EvaluationKeys:
    """Parse what `ConcreteClient.evaluation_keys` returned.

    Raises:
        BackendError: if it is malformed.
    """
    with explained("read the evaluation keys of"):
        return EvaluationKeys.deserialize(content)


class ConcreteServer:
    """Runs ciphertexts."""

    def __init__(self, folder: Path) -> None:
        """Load machine code.

        Args:
            folder: holds the files that `server_files` returned.
        """
        with explained("load"):
            self._server = Server(Library(str(folder)), False, None)

    def run(self, inputs: Sequence[bytes], keys: EvaluationKeys) -> list[bytes]:
        """Run the circuit.

        Raises:
            BackendError: if a ciphertext is malformed or does not fit.
        """
        with explained("run"):
            values = [Value.deserialize(x) for x in inputs]
            results = self._server.run(*values, evaluation_keys=keys)
        many = results if isinstance(results, tuple) else (results,)
        return [bytes(r.serialize()) for r in many]

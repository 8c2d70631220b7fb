"""The keys of a client: made once for a bundle, kept beside it, the evaluation keys to be sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fhe_fx.backends.keyfile import read_keys, write_keys, write_private
from fhe_fx.errors import ArtifactError
from fhe_fx.export.bundle import ClientBundle, load_client_bundle

__all__ = ["SECRET", "StoredKeys", "key_id", "keygen", "keys_directory"]

SECRET = "secret.keys"
EVALUATION = "evaluation.keys"


@dataclass(frozen=True)
class StoredKeys:
    """Keys in files."""

    secret: Path
    """The secret keys; of mode 0600, and encrypted if there is a passphrase."""
    evaluation: Path
    """What the server is sent; it reveals nothing of the secret keys."""
    id: str
    """The sha256 of the evaluation keys."""

    def read_secret(self, keyset: str, passphrase: str | None) -> bytes:
        """Return the secret keys.

        Raises:
            ArtifactError: if they cannot be read; says why.
        """
        return read_keys(self.secret, keyset, passphrase)


def keys_directory(client: str | Path, keys: str | Path | None = None) -> Path:
    """Return where the keys of a client's bundle are: in `CLIENT.keys` beside it, unless told."""
    client = Path(client).resolve()
    return Path(keys) if keys is not None else client.with_name(f"{client.name}.keys")


def key_id(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def keygen(
    client: str | Path,
    keys: str | Path | None = None,
    passphrase: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> StoredKeys:
    """Make the keys of a client's bundle and write them.

    Args:
        client: a client's bundle.
        keys: directory to write to, made if missing; by default `CLIENT.keys` beside the bundle.
        passphrase: encrypts the secret keys.
        on_stage: told what is being done, in two words.

    Raises:
        ArtifactError: if there are keys already, which are never overwritten.
    """
    bundle, directory = load_client_bundle(client), keys_directory(client, keys)
    if (directory / SECRET).exists():
        raise ArtifactError(f"{directory / SECRET} exists; keys are never overwritten.")
    from fhe_fx.backends.concrete.parties import ConcreteClient

    on_stage("making keys")
    party = ConcreteClient(bundle.specs)
    party.keygen()
    on_stage("writing keys")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / EVALUATION).unlink(missing_ok=True)  # of an attempt that was cut off
    write_private(directory / EVALUATION, party.evaluation_keys())
    # The secret keys come last: where they are, all is.
    write_keys(directory / SECRET, party.secret_keys(), bundle.manifest["keyset"], passphrase)
    return stored_keys(bundle, directory)


def stored_keys(bundle: ClientBundle, directory: Path) -> StoredKeys:
    """Find the keys that `keygen` wrote.

    Raises:
        ArtifactError: if there are none.
    """
    secret, evaluation = directory / SECRET, directory / EVALUATION
    for path in (secret, evaluation):
        if not path.is_file():
            raise ArtifactError(
                f"There is no {path}, so {bundle.manifest['name']} has no keys. "
                f"Make them with: fhe-fx keygen CLIENT_DIR"
            )
    return StoredKeys(secret, evaluation, key_id(evaluation))

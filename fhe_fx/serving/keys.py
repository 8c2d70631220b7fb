"""The keys of a client: made once for a bundle, kept beside it, the evaluation keys to be sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fhe_fx.backends.keyfile import read_keys, write_keys, write_private
from fhe_fx.errors import ArtifactError
from fhe_fx.export.bundle import ClientBundle, load_client_bundles
from fhe_fx.export.pretrained import client_directory

__all__ = ["SECRET", "StoredKeys", "key_id", "key_place", "keygen", "keys_directory", "make_keys"]

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
    client: str | Path, keys: str | Path | None = None, passphrase: str | None = None
) -> StoredKeys:
    """Make the keys of the one circuit of a client's directory; see `make_keys`."""
    (made,) = make_keys(client, keys, passphrase)
    return made


def make_keys(
    client: str | Path,
    keys: str | Path | None = None,
    passphrase: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[StoredKeys]:
    """Make the keys of a client's bundle, or of all circuits of a client's model, and write them.

    Circuits with the same key parameters share keys.

    Args:
        client: a client's directory of an export.
        keys: directory to write to, made if missing; by default `CLIENT.keys` beside the bundle.
        passphrase: encrypts the secret keys.
        on_stage: told what is being done, in a few words.

    Returns:
        The keys for each set of parameters; those of an attempt that was cut off are among them.

    Raises:
        ArtifactError: if all keys are there already; they are never overwritten.
    """
    client = client_directory(client)
    places = {
        key_place(client, keys, folder, bundle): bundle
        for folder, bundle in load_client_bundles(client).items()
    }
    missing = [place for place in places if not (place / SECRET).exists()]
    if not missing:
        existing = next(iter(places)) / SECRET
        raise ArtifactError(f"{existing} exists; keys are never overwritten.")
    for number, place in enumerate(missing, 1):
        on_stage(f"making keys, {number} of {len(missing)}")
        _make(places[place], place, passphrase)
    return [stored_keys(bundle, place) for place, bundle in places.items()]


def key_place(
    client: str | Path, keys: str | Path | None, folder: Path, bundle: ClientBundle
) -> Path:
    """Return the directory of a circuit's keys.

    Args:
        client: a client's bundle or model.
        keys: as given to `keys_directory`.
        folder: of the circuit's own bundle; the same as `client`, unless that is a model.
        bundle: the circuit's.
    """
    directory = keys_directory(client, keys)
    is_of_a_model = folder != Path(client)
    return directory / str(bundle.manifest["keyset"])[:16] if is_of_a_model else directory


def _make(bundle: ClientBundle, directory: Path, passphrase: str | None) -> None:
    from fhe_fx.backends.concrete.parties import ConcreteClient

    party = ConcreteClient(bundle.specs)
    party.keygen()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / EVALUATION).unlink(missing_ok=True)  # of an attempt that was cut off
    write_private(directory / EVALUATION, party.evaluation_keys())
    # The secret keys come last: where they are, all is.
    write_keys(directory / SECRET, party.secret_keys(), bundle.manifest["keyset"], passphrase)


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

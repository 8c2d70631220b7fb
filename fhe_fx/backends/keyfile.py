"""Secret keys in a file: private to its owner, whole or not there, optionally under a passphrase.

The file is a line that names the format, a line of JSON, and the keys. With a passphrase the keys
are encrypted by AES-256-GCM, which authenticates the JSON line too, under a key that scrypt (RFC
7914) derives; both come from the `cryptography` package.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fhe_fx.errors import ArtifactError

__all__ = ["read_keys", "write_keys", "write_private"]

_MAGIC = b"fhe_fx keys 2\n"
_SCRYPT = {"n": 1 << 17, "r": 8, "p": 1}
"""128 MB and a third of a second for each guess; OWASP's first choice."""
_MAX_SCRYPT_N = 1 << 20
_CIPHER = "AES-256-GCM, scrypt"


def write_keys(path: Path, payload: bytes, circuit: str, passphrase: str | None = None) -> None:
    """Write keys to a new file of mode 0600.

    Args:
        path: must not exist.
        payload: the keys.
        circuit: what the keys belong to; `read_keys` asks for the same.
        passphrase: encrypts the keys; empty or None leaves them as they are.

    Raises:
        ArtifactError: if the file exists, or cannot be written.
    """
    header: dict[str, Any] = {"circuit": circuit}
    if passphrase:
        header |= {"cipher": _CIPHER, **_SCRYPT}
        header |= {"salt": secrets.token_hex(16), "nonce": secrets.token_hex(12)}
        line = _line(header)
        payload = _aead(passphrase, header).encrypt(bytes.fromhex(header["nonce"]), payload, line)
    else:
        line = _line({**header, "sha256": hashlib.sha256(payload).hexdigest()})
    try:
        write_private(path, _MAGIC + line, payload)
    except FileExistsError as error:
        raise ArtifactError(f"{path} exists; keys are never overwritten.") from error
    except OSError as error:
        raise ArtifactError(f"Keys cannot be written to {path}: {error.strerror}.") from error


def read_keys(path: Path, circuit: str, passphrase: str | None = None) -> bytes:
    """Read keys that `write_keys` wrote.

    Raises:
        ArtifactError: if others can read the file, it is truncated, altered, or of another circuit,
            or if the passphrase is missing or wrong.
    """
    content = _read_private(path)
    if not content.startswith(_MAGIC):
        raise ArtifactError(f"{path} is not a file of fhe_fx keys.")
    line, _, payload = content[len(_MAGIC) :].partition(b"\n")
    try:
        header: Mapping[str, Any] = json.loads(line)
        belongs_to = str(header["circuit"])
        is_encrypted = "cipher" in header
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(path) from None
    if is_encrypted:
        payload = _decrypted(path, header, line + b"\n", payload, passphrase)
    elif hashlib.sha256(payload).hexdigest() != header.get("sha256"):
        raise _damaged(path)
    if belongs_to != circuit:
        raise ArtifactError(f"{path} holds keys of another circuit. Give another file name.")
    return payload


def write_private(path: Path, *parts: bytes) -> None:
    """Write a new file of mode 0600; it appears under its name when it is whole and on the disk.

    Raises:
        FileExistsError: if the name is taken.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.link(name, path)  # unlike a rename, fails if the name is taken
    finally:
        os.unlink(name)


def _line(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True).encode() + b"\n"


def _damaged(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} is truncated or altered. Delete it; new keys are then made.")


def _aead(passphrase: str, header: Mapping[str, Any]) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    except ImportError as error:
        raise ArtifactError(
            "A passphrase needs the cryptography package: pip install 'fhe_fx[client]'."
        ) from error
    n, r, p = (int(header[k]) for k in ("n", "r", "p"))
    if not (2 <= n <= _MAX_SCRYPT_N and 1 <= r <= 16 and 1 <= p <= 16):
        raise ValueError("scrypt parameters beyond what this fhe_fx writes")
    kdf = Scrypt(salt=bytes.fromhex(header["salt"]), length=32, n=n, r=r, p=p)
    return AESGCM(kdf.derive(passphrase.encode()))


def _decrypted(
    path: Path, header: Mapping[str, Any], line: bytes, payload: bytes, passphrase: str | None
) -> bytes:
    if not passphrase:
        raise ArtifactError(f"{path} is encrypted under a passphrase, and none was given.")
    try:
        nonce = bytes.fromhex(header["nonce"])
        cipher = _aead(passphrase, header)
    except (ValueError, KeyError, TypeError):
        raise _damaged(path) from None
    with contextlib.suppress(Exception):  # InvalidTag, of a package that may be absent here
        return bytes(cipher.decrypt(nonce, payload, line))
    raise ArtifactError(
        f"{path} cannot be decrypted: the passphrase is wrong, or the file was altered."
    )


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

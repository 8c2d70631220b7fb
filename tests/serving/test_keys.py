"""Keys are private files, whole or not there, under a passphrase if one is given."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fhe_fx.backends.keyfile import read_keys, write_keys
from fhe_fx.cli import app
from fhe_fx.errors import ArtifactError
from fhe_fx.export import load_client_bundle
from fhe_fx.serving.keys import StoredKeys, keygen, keys_directory, stored_keys


@pytest.mark.fhe
def test_keygen_writes_private_files_and_an_id(exported: Path, alice: StoredKeys) -> None:
    assert alice.secret.parent == exported / "client.keys"
    for path in (alice.secret, alice.evaluation):
        assert path.stat().st_mode & 0o777 == 0o600
    assert alice.secret.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(p.name for p in alice.secret.parent.iterdir()) == [
        "evaluation.keys",
        "secret.keys",
    ]
    assert alice.id == hashlib.sha256(alice.evaluation.read_bytes()).hexdigest()
    key_bytes = load_client_bundle(exported / "client").manifest["cost"]["key_bytes"]
    assert 3 * alice.evaluation.stat().st_size < key_bytes  # seeded
    with pytest.raises(ArtifactError, match=r"secret\.keys exists; keys are never overwritten"):
        keygen(exported / "client")


@pytest.mark.fhe
def test_two_clients_have_different_keys(alice: StoredKeys, bob: StoredKeys) -> None:
    assert alice.id != bob.id
    assert alice.secret.read_bytes()[-4096:] != bob.secret.read_bytes()[-4096:]


@pytest.mark.fhe
def test_the_evaluation_keys_do_not_hold_the_secret_ones(alice: StoredKeys) -> None:
    """Concrete writes a secret key as words of 0 and 1; eight of them in a row tell one."""
    import re

    words = re.compile(rb"(?:[\x00\x01]\x00{7}){64}")
    assert words.search(alice.secret.read_bytes())
    assert not words.search(alice.evaluation.read_bytes())


@pytest.mark.fhe
def test_the_command_makes_keys_under_a_passphrase(exported: Path, tmp_path: Path) -> None:
    words = tmp_path / "passphrase"
    words.write_text("correct horse\n")
    arguments = ["keygen", exported / "client", "--keys", tmp_path / "keys"]
    arguments += ["--passphrase-file", words]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    bundle = load_client_bundle(exported / "client")
    made = stored_keys(bundle, tmp_path / "keys")
    secret, key = result.stdout.strip().splitlines()
    assert secret.endswith("encrypted under the passphrase; never give them away")
    assert key.endswith(f"MB for the server, id {made.id}")
    assert made.read_secret(bundle.manifest["keyset"], "correct horse")
    again = CliRunner().invoke(app, [str(a) for a in arguments])
    assert again.exit_code == 2
    assert "keys are never overwritten" in again.stderr


def test_keys_under_a_passphrase(tmp_path: Path) -> None:
    path, payload = tmp_path / "keys", b"secret" * 100
    write_keys(path, payload, "circuit", "correct horse")
    content = path.read_bytes()
    assert b"secret" not in content
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_keys(path, "circuit", "correct horse") == payload
    wrong = "the passphrase is wrong, or the file was altered"
    with pytest.raises(ArtifactError, match=wrong):
        read_keys(path, "circuit", "battery staple")
    with pytest.raises(ArtifactError, match="is encrypted under a passphrase, and none was given"):
        read_keys(path, "circuit")
    with pytest.raises(ArtifactError, match="holds keys of another circuit"):
        read_keys(path, "other", "correct horse")
    for damaged in (
        content[:-1],
        content[:-1] + bytes([content[-1] ^ 1]),
        content.replace(b'"circuit": "circuit"', b'"circuit": "circuis"'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=wrong):
            read_keys(path, "circuit", "correct horse")
    path.write_bytes(content.replace(b'"n": 131072', b'"n": 1310720000'))
    with pytest.raises(ArtifactError, match="is truncated or altered"):
        read_keys(path, "circuit", "correct horse")


def test_two_files_of_one_key_differ(tmp_path: Path) -> None:
    for name in "ab":
        write_keys(tmp_path / name, b"payload" * 10, "circuit", "same")
    assert (tmp_path / "a").read_bytes()[-70:] != (tmp_path / "b").read_bytes()[-70:]


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="exists; keys are never overwritten"):
        write_keys(tmp_path / "keys", b"payload", "circuit")
    assert [p.name for p in tmp_path.iterdir()] == ["keys"]
    assert (tmp_path / "keys").read_bytes() == b"mine"
    with pytest.raises(ArtifactError, match="Keys cannot be written to"):
        write_keys(tmp_path / "none" / "keys", b"payload", "circuit")


def test_missing_keys_are_asked_for(exported: Path, tmp_path: Path) -> None:
    client = Path(shutil.copytree(exported / "client", tmp_path / "client"))
    with pytest.raises(ArtifactError, match="Make them with: fhe-fx keygen CLIENT_DIR"):
        stored_keys(load_client_bundle(client), keys_directory(client))

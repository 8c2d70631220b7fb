"""Each party's directory holds its own, states what it is, and is refused when it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import torch as safetensors

from fhe_fx.errors import ArtifactError
from fhe_fx.export import load_client_bundle, load_server_bundle
from fhe_fx.export.archive import unpack
from fhe_fx.export.artifact import CLIENT_ENTRIES, SERVER_ENTRIES
from fhe_fx.runtime.region import Region
from tests.export.conftest import make_net


def _client_bytes(written: Path) -> list[bytes]:
    """Return every file that a client gets, archives unpacked."""
    files = [p.read_bytes() for p in (written / "client").rglob("*") if p.is_file()]
    zipped = (written / "client" / "client.zip").read_bytes()
    return [*files, *unpack("client.zip", zipped, CLIENT_ENTRIES).values()]


def _encodings(values: torch.Tensor) -> set[bytes]:
    """Return the bytes of a few numbers in every type that a file might hold them in."""
    array, kinds = values.double().numpy(), ["<f4", "<f8"]
    if np.array_equal(array, array.round()):
        kinds += [k for k in ("<i2", "<i4", "<i8") if np.array_equal(array.astype(k), array)]
    return {array.astype(kind).tobytes() for kind in kinds}


def test_the_client_gets_no_weight_in_float_or_integers(written: Path) -> None:
    server = (written / "server" / "server.zip").read_bytes()
    program = safetensors.load(unpack("server.zip", server, SERVER_ENTRIES)["program.safetensors"])
    secrets = [*make_net().body.state_dict().values(), *program.values()]
    held, n_searched = _client_bytes(written), 0
    for tensor in secrets:
        flat = tensor.reshape(-1)
        flat = flat[flat.abs() > 1] if not tensor.is_floating_point() else flat
        for k in range(len(flat) - 1):
            if flat[k] == flat[k + 1]:  # twice the same number stands anywhere by chance
                continue
            for needle in _encodings(flat[k : k + 2]):
                n_searched += 1
                assert not any(needle in content for content in held)
    assert n_searched > 100
    # The search finds what is there: the same pairs in the server's own file.
    assert all(
        any(n in safetensors.save(program) for n in _encodings(t.reshape(-1)[:2]))
        for t in program.values()
    )


def test_the_client_gets_a_scale_and_an_offset_a_number_and_no_more(written: Path) -> None:
    """By structure: what the files hold beside text is the codec, whose size is the ports'."""
    zipped = (written / "client" / "client.zip").read_bytes()
    entries = unpack("client.zip", zipped, CLIENT_ENTRIES)
    tensors = safetensors.load(entries["codec.safetensors"])
    assert all(name.endswith((".scale", ".offset")) for name in tensors)
    assert sum(t.numel() for t in tensors.values()) <= 2 * (2 * 6 + 3)
    assert set(json.loads(entries["client.specs.json"])) <= {
        "keyset",
        "circuits",
        "tfhers_specs",
    }
    assert sorted(p.name for p in (written / "client").iterdir()) == ["client.zip", "manifest.json"]


def test_offsets_of_results_are_whole_units(written: Path, region: Region) -> None:
    """A bias in them is known as well as one result tells it, and no better."""
    for port in load_client_bundle(written / "client").codec.results:
        units = port.type.offset / port.type.scale
        torch.testing.assert_close(units, units.round(), rtol=0, atol=1e-9)


def test_both_state_one_export(written: Path) -> None:
    client, server = load_client_bundle(written / "client"), load_server_bundle(written / "server")
    assert client.manifest["bundle"] == server.manifest["bundle"]
    assert client.manifest["keyset"] == server.manifest["keyset"]
    assert "sharedlib.so" in server.files
    assert "machine" not in client.manifest


def test_one_is_not_the_other(written: Path) -> None:
    with pytest.raises(ArtifactError, match="is an fhe_fx server bundle; an fhe_fx client bundle"):
        load_client_bundle(written / "server")
    with pytest.raises(ArtifactError, match="is an fhe_fx artifact; an fhe_fx server bundle"):
        load_server_bundle(written)


@pytest.mark.parametrize("party", ["client", "server"])
def test_damage_is_found(copy: Path, party: str) -> None:
    load = load_client_bundle if party == "client" else load_server_bundle
    path = copy / party / f"{party}.zip"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="was altered: its sha256 is not the one in manifest"):
        load(copy / party)
    path.write_bytes(content)
    manifest = copy / party / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 2', '"schema": 1'))
    with pytest.raises(ArtifactError, match="schema version 1; this fhe_fx reads version 2"):
        load(copy / party)

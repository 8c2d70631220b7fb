"""Artefacts are written whole, run without the model, and refused when anything is wrong."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fhe_fx
from fhe_fx.cli import app
from fhe_fx.errors import ArtifactError, InputError
from fhe_fx.export import FILES, export_region, load_artifact, read_manifest
from fhe_fx.export import region as region_module
from fhe_fx.export.archive import pack, unpack
from fhe_fx.export.artifact import PARTIES, SERVER_ENTRIES, WHOLE, read_drawn
from fhe_fx.export.manifest import file_entry, write_manifest
from fhe_fx.ir.snapshot import snapshot
from fhe_fx.report import Report, report_on
from fhe_fx.runtime.region import Region
from tests.export.conftest import make_region


def refused(directory: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_artifact(directory)
    return str(caught.value).replace(str(directory), "DIR")


def edit(directory: Path, **changes: Any) -> None:
    """Change a manifest as another fhe_fx would have written it."""
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["sha256"]
    write_manifest(directory, {**manifest, **changes})


# What is written ------------------------------------------------------------------------------


def test_manifest_states_cost_shapes_and_validation(written: Path, region: Region) -> None:
    manifest = read_manifest(written)
    assert manifest["module_path"] == "body"
    assert manifest["heads"] is None
    assert manifest["options"]["n_bits"] == 4
    assert [i["shape"] for i in manifest["inputs"]] == [[1, 6]]
    assert [r["shape"] for r in manifest["results"]] == [[1, 3]]
    assert region.facts is not None
    assert manifest["cost"]["look_ups"] == region.facts.look_ups
    assert manifest["cost"]["key_bytes"] == region.facts.key_bytes
    (told,) = Report.from_costs([manifest["cost"]]).regions
    (known,) = report_on([(region.program, region.facts)]).regions
    assert (told.nodes, told.edges) == (known.nodes, known.edges)
    assert all(n.overflow is not None for n in told.nodes)
    assert manifest["versions"]["fhe_fx"] == fhe_fx.__version__
    assert manifest["validation"]["is_clear_equal"]
    assert manifest["validation"]["simulated_error_to_clear"] < 0.5
    held = sorted(p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file())
    assert held == sorted([*FILES, "manifest.json"])
    assert {p.name for p in written.iterdir()} == {
        "client.zip", "server.zip", "graph.txt", "graph.json", "manifest.json", "client", "server"
    }  # fmt: skip
    assert (written / "graph.txt").read_text() == f"{region.program}\n"
    for copy, name in PARTIES.items():
        assert (written / copy).read_bytes() == (written / name).read_bytes()


def test_the_graph_is_drawn_from_an_artefact_and_from_what_the_server_has(
    written: Path, region: Region, tmp_path: Path
) -> None:
    page, picture = tmp_path / "g.html", tmp_path / "g.svg"
    expected = snapshot(region.program)
    for directory in (written, written / "server"):
        drawn = read_drawn(directory)
        assert {k: drawn[k] for k in expected} == expected
        command = ["graph", str(directory), "--html", str(page), "--svg", str(picture)]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.stderr
        assert expected["nodes"][-1]["name"] in page.read_text()
        assert picture.read_text().startswith("<svg")
    with pytest.raises(ArtifactError, match=r"holds no graph\.json: the graph belongs to the"):
        read_drawn(written / "client")


def test_same_region_gives_same_client_file(region: Region, written: Path, tmp_path: Path) -> None:
    export_region(region, tmp_path / "again", validate=False)
    ours, theirs = (d / "client.zip" for d in (tmp_path / "again", written))
    assert ours.read_bytes() == theirs.read_bytes()


def test_artifact_runs_as_the_region(written: Path, region: Region) -> None:
    sample = region.captured.samples[3]
    with load_artifact(written) as artifact:
        clear = artifact.clear(sample)
        noisy = artifact.simulate(sample)
    assert torch.equal(clear[0], region.run_circuit(sample, "clear")[0])
    assert noisy[0].shape == clear[0].shape
    assert float((noisy[0] - clear[0]).norm() / clear[0].norm()) < 0.5


def test_inputs_that_do_not_fit_are_refused(written: Path) -> None:
    with load_artifact(written) as artifact:
        with pytest.raises(InputError, match=re.escape("shape [6]; the circuit takes [1, 6].")):
            artifact.clear([torch.zeros(6)])
        with pytest.raises(InputError, match=r"^Input 0 holds nan or inf\.$"):
            artifact.clear([torch.full((1, 6), torch.nan)])
        with pytest.raises(InputError, match=r"^2 inputs were given; the circuit takes 1\.$"):
            artifact.clear([torch.zeros(1, 6)] * 2)


@pytest.mark.fhe
def test_encrypted_execution_with_keys_in_a_file(
    written: Path, region: Region, tmp_path: Path
) -> None:
    keys, sample = tmp_path / "keys", region.captured.samples[0]
    with load_artifact(written) as artifact:
        artifact.circuit().save_keys(keys)
        first = artifact.execute(sample)[0]
        with pytest.raises(ArtifactError, match="exists; keys are never overwritten"):
            artifact.circuit().save_keys(keys)
    assert keys.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["keys"]
    with load_artifact(written) as artifact:
        artifact.circuit().load_keys(keys)
        second = artifact.execute(sample)[0]
        clear = artifact.clear(sample)[0]
        for result in (first, second):
            assert float((result - clear).norm() / clear.norm()) < 0.5
        keys.chmod(0o640)
        with pytest.raises(ArtifactError, match=r"others can read it \(mode 0640\)"):
            artifact.circuit().load_keys(keys)
        keys.chmod(0o600)
        whole = keys.read_bytes()
        keys.write_bytes(whole[:-1])
        with pytest.raises(ArtifactError, match="is truncated or altered"):
            artifact.circuit().load_keys(keys)
        head, rest = whole.split(b'"circuit": "', 1)
        keys.write_bytes(head + b'"circuit": "' + b"0" * 64 + rest[64:])
        with pytest.raises(ArtifactError, match="holds keys of another circuit"):
            artifact.circuit().load_keys(keys)


# What is refused ------------------------------------------------------------------------------


def test_missing_directory_and_manifest(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == "There is no directory DIR."
    assert refused(tmp_path).startswith("DIR has no manifest.json; it is not an artefact.")


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(copy: Path, name: str) -> None:
    path = copy / name
    content = path.read_bytes()
    again = "Export the region again."
    path.write_bytes(content[:-7])
    assert refused(copy) == (
        f"DIR/{name} is truncated: it has {len(content) - 7:,} bytes, {len(content):,} were "
        f"written. {again}"
    )
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refused(copy) == (
        f"DIR/{name} was altered: its sha256 is not the one in manifest.json. {again}"
    )
    path.unlink()
    assert refused(copy) == f"DIR/{name} is missing. {again}"


def test_damaged_manifest(copy: Path) -> None:
    path = copy / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"module_path": "body"', '"module_path": "soul"'))
    assert refused(copy) == (
        "DIR/manifest.json was altered: its sha256 is not the one that it states. "
        "Export the region again."
    )
    path.write_text(text[: len(text) // 2])
    assert refused(copy).startswith("DIR/manifest.json is truncated or altered: it is not JSON (")
    path.write_text("[]")
    assert refused(copy) == "DIR/manifest.json is not the manifest of an fhe_fx artefact."
    edit_files = json.loads(text)["files"]
    path.write_text(text)
    edit(copy, files={"../../etc/passwd": edit_files["graph.txt"]})
    assert refused(copy) == (f"DIR/manifest.json was altered: it does not list {', '.join(WHOLE)}.")


def test_other_schema(copy: Path) -> None:
    edit(copy, schema=3)
    assert refused(copy) == (
        f"DIR has schema version 3; this fhe_fx reads version 2. Export the region again, or "
        f"install the fhe_fx that wrote it ({fhe_fx.__version__})."
    )


def test_other_versions(copy: Path) -> None:
    versions = read_manifest(copy)["versions"]
    edit(copy, versions={**versions, "concrete-python": "3.1.0"})
    assert refused(copy) == (
        f"DIR was made with concrete-python 3.1.0; here is concrete-python "
        f"{versions['concrete-python']}. Export the region again, or install concrete-python 3.1.0."
    )
    edit(copy, versions=versions, machine={"system": "Plan9", "architecture": "mips"})
    assert refused(copy).startswith("DIR holds machine code for {'system': 'Plan9'")


def test_archive_with_other_entries(copy: Path) -> None:
    """Sums that fit do not help an archive that holds more, or less, than it should."""
    manifest = read_manifest(copy)
    server = unpack("server.zip", (copy / "server.zip").read_bytes(), SERVER_ENTRIES)

    def put(content: bytes) -> None:
        (copy / "server.zip").write_bytes(content)
        edit(copy, files={**manifest["files"], "server.zip": file_entry(content)})

    put(pack({**server, "../evil": b""}))
    assert "unexpected: '../evil'" in refused(copy)
    put(pack({k: v for k, v in server.items() if k != "sharedlib.so"}))
    assert "missing: 'sharedlib.so'" in refused(copy)
    put(b"no zip file")
    assert refused(copy) == "server.zip is not a zip file that can be read: File is not a zip file."


def test_archive_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhe_fx.export.archive.MAX_BYTES", 10)
    with pytest.raises(ArtifactError, match=r"^a\.zip unpacks to 11 bytes; at most 10 are read\.$"):
        unpack("a.zip", pack({"x": b"0" * 11}), ["x"])


def test_archive_holds_plain_names(written: Path) -> None:
    for name in ("client.zip", "server.zip"):
        with zipfile.ZipFile(written / name) as archive:
            assert not [n for n in archive.namelist() if "/" in n or n.startswith(".")]


# Where it is written --------------------------------------------------------------------------


def test_only_an_artefact_is_replaced(region: Region, copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds 'notes\.txt', which no export wrote"):
        export_region(region, copy, validate=False)
    (copy / "notes.txt").unlink()
    export_region(region, copy, validate=False)
    assert read_manifest(copy)["validation"] is None
    (copy / "client" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds 'client/notes\.txt', which no export wrote"):
        export_region(region, copy, validate=False)
    (copy / "client" / "notes.txt").unlink()
    (copy / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"is not replaced: .* has no manifest"):
        export_region(region, copy, validate=False)
    graph = copy / "graph.txt"
    with pytest.raises(ArtifactError, match=r"graph\.txt is a file, so .* cannot be made in it"):
        export_region(region, graph / "b")
    export_region(region, copy.parent / "made" / "deep", validate=False)
    assert read_manifest(copy.parent / "made" / "deep")
    with pytest.raises(ArtifactError, match="is a file; give the name of a directory"):
        export_region(region, graph)


def test_nothing_is_left_after_an_error(
    region: Region, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    monkeypatch.setattr(region_module, "_validate", fail)
    for directory in (copy.parent / "new", copy):
        with pytest.raises(KeyboardInterrupt):
            export_region(region, directory)
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_validation_compares_with_the_region(region: Region, written: Path) -> None:
    other = make_region(n_bits=3)
    with (
        load_artifact(written) as artifact,
        pytest.raises(ArtifactError, match="does not compute what was compiled"),
    ):
        region_module.validate(other, artifact)


def test_empty_directory_is_used(region: Region, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_region(region, tmp_path / "empty", validate=False)
    assert os.listdir(tmp_path) == ["empty"]
    assert load_artifact(tmp_path / "empty").manifest["name"] == "body"

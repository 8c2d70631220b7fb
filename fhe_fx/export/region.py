"""Writing an artefact: what a client and a server need to run an encrypted region apart."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhe_fx.errors import ArtifactError
from fhe_fx.export.archive import pack
from fhe_fx.export.artifact import (
    CLIENT,
    DRAWN,
    FILES,
    GRAPH,
    PARTY_FILES,
    SERVER,
    SPECS,
    Artifact,
    load_artifact,
    simulated,
)
from fhe_fx.export.bundle import bundle_id, party_manifest
from fhe_fx.export.directory import new_directory
from fhe_fx.export.graph import graph_to_entries
from fhe_fx.export.manifest import (
    FORMAT,
    SCHEMA,
    file_entries,
    file_entry,
    machine,
    versions,
    write_manifest,
)
from fhe_fx.ir import dialect as d
from fhe_fx.ir.snapshot import snapshot
from fhe_fx.report import report_on
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.region import Region

__all__ = ["export_region", "validate", "write_region"]

VALIDATION_SAMPLES = 8
NOISIER_AT_MOST = 3.0
"""How many times larger the error of the reloaded simulation may be: a different draw of noise."""


def export_region(
    region: Region,
    directory: str | Path,
    validate: bool = True,
    *,
    origin: str = "",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Write a region as `client.zip`, `server.zip`, `graph.txt` and `manifest.json`.

    The directories `client` and `server` in it are to be handed to the two parties: the same files
    with a manifest of their own, which says nothing of the other party.

    The directory appears when all of it is written and validated; after an error it is as it was.

    Args:
        region: compiled here unless it is already.
        directory: new, empty, or an artefact, which is replaced.
        validate: reload what was written, and compare it with the region on calibration samples.
        origin: the model that the region comes from, for the manifest.
        on_stage: told what is being done, in two words.

    Returns:
        The manifest.

    Raises:
        ArtifactError: if the directory holds something else, or if what was written does not
            compute what the region computes.
        BitWidthError: if the region cannot be compiled.
    """
    with new_directory(directory, FILES) as partial:
        manifest = write_region(
            region,
            partial,
            {party: partial / party for party in ("client", "server")},
            validate,
            origin=origin,
            on_stage=on_stage,
        )
        manifest["files"] = file_entries(partial)
        write_manifest(partial, manifest)
    return manifest


def write_region(
    region: Region,
    directory: Path,
    parties: Mapping[str, Path],
    validate: bool,
    *,
    origin: str,
    on_stage: Callable[[str], None],
) -> dict[str, Any]:
    """Write an artefact into a directory that exists; see `export_region`.

    Args:
        region: compiled here unless it is already.
        directory: gets the whole.
        parties: "client" and "server": directories that are made, and get what each is handed.
        validate: whether to reload and compare.
        origin: the model that the region comes from, for the manifest.
        on_stage: told what is being done, in two words.

    Returns:
        The manifest, which is written too.
    """
    on_stage("compiling")
    region.circuit()
    on_stage("writing")
    manifest = _manifest(region, origin)
    files = _files(region)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    bundle = bundle_id(files[CLIENT], files[SERVER])
    for party, names in PARTY_FILES.items():
        parties[party].mkdir(parents=True)
        for name in names:
            _link(directory / name, parties[party] / name)
        own = {name: file_entry(files[name]) for name in names}
        write_manifest(
            parties[party], party_manifest(party, {**manifest, "bundle": bundle}, region, own)
        )
    manifest["files"] = {name: file_entry(content) for name, content in files.items()}
    write_manifest(directory, manifest)
    if validate:
        on_stage("validating")
        with load_artifact(directory) as artifact:
            manifest["validation"] = _validate(region, artifact)
        write_manifest(directory, manifest)
    return manifest


def _link(path: Path, copy: Path) -> None:
    """Let a file appear a second time, on the same bytes where the file system can."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def _files(region: Region) -> dict[str, bytes]:
    from fhe_fx.backends.concrete import ConcreteCircuit
    from fhe_fx.backends.concrete.artifact import client_specs, server_files

    circuit = region.circuit()
    assert isinstance(circuit, ConcreteCircuit)
    simulation = server_files(circuit, is_simulated=True)
    server = {
        **server_files(circuit, is_simulated=False),
        **{simulated(name): content for name, content in simulation.items()},
        **graph_to_entries(region.program),
    }
    client = {SPECS: client_specs(circuit), **Codec.of(region.program).to_entries()}
    return {
        CLIENT: pack(client),
        SERVER: pack(server),
        GRAPH: f"{region.program}\n".encode(),
        DRAWN: json.dumps(_drawn(region)).encode(),
    }


def _drawn(region: Region) -> dict[str, Any]:
    """Return the program as the last step of its lowering, as `fhe-fx graph` reads steps."""
    passes = list(region.pipeline)
    notes = [dataclasses.asdict(note) for note in region.program.notes]
    last = {"pass": passes[-1].text() if passes else "given", "number": len(passes)}
    return {**last, "notes": notes, **snapshot(region.program)}


def _manifest(region: Region, origin: str) -> dict[str, Any]:
    program, codec = region.program, Codec.of(region.program)
    lengths = [region.tokens if region.keyring is not None else None]
    cost = dataclasses.asdict(report_on([(program, region.facts)], lengths).regions[0])
    del cost["estimated_seconds"]  # it holds for the machine that reads, not for this one
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "versions": versions(),
        "machine": machine(),
        "origin": origin,
        "name": program.name,
        "module_path": region.name,
        "heads": _heads(region),
        "options": program.options.as_dict(),
        "passes": [p.name for p in region.pipeline],
        "pipeline": str(region.pipeline),
        "inputs": [
            {"name": n.name, "shape": list(d.shape_of(n)), "dtype": "float32"}
            for n in region.captured.placeholders
        ],
        "results": [{"shape": list(p.shape), "dtype": "float32"} for p in codec.results],
        "encodings": {
            "inputs": [p.summary() for p in codec.inputs],
            "results": [p.summary() for p in codec.results],
        },
        "parameters": list(region.facts.parameters) if region.facts else [],
        "security_bits": _security_bits(region),
        "cost": cost,
        "validation": None,
        "files": {},
    }


def _security_bits(region: Region) -> int:
    from fhe_fx.backends.concrete.artifact import security_bits

    return security_bits(region.circuit())


def _heads(region: Region) -> list[int] | None:
    """Read the chosen heads from the name that `build_region` gave the program."""
    chosen = region.program.name.removeprefix(region.name).removeprefix(" heads ")
    return [int(h) for h in chosen.split(",")] if chosen else None


def validate(region: Region, artifact: Artifact) -> dict[str, Any]:
    """Compare a reloaded artefact with the region that it was written from.

    Returns:
        The relative errors, over all samples: of the integers in the clear against float, of the
        simulation against the integers, and of the simulation before it was saved.

    Raises:
        ArtifactError: if the clear results differ at all, or the simulated ones by more than noise.
    """
    samples = region.captured.samples[:VALIDATION_SAMPLES]
    exact = [region.run_circuit(s, "clear") for s in samples]
    clear = [artifact.clear(s) for s in samples]
    for number, (ours, theirs) in enumerate(zip(exact, clear, strict=True)):
        if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            raise ArtifactError(
                f"{region.program.name}: the program that was written does not compute what was "
                f"compiled (calibration sample {number}). This is a fault of fhe_fx; report it."
            )
    before = _error([region.run_circuit(s, "simulate") for s in samples], exact)
    after = _error([artifact.simulate(s) for s in samples], exact)
    if not after <= NOISIER_AT_MOST * before + 0.1:
        raise ArtifactError(
            f"{region.program.name}: the circuit that was written simulates with a relative error "
            f"of {after:.2g} against the clear integers; before it was written, {before:.2g}."
        )
    return {
        "samples": len(samples),
        "is_clear_equal": True,
        "clear_error_to_float": _error(exact, [region.captured(*s) for s in samples]),
        "simulated_error_to_clear": after,
        "simulated_error_to_clear_before_writing": before,
    }


_validate = validate  # `export_region` has an argument of this name


def _error(found: list[Any], expected: list[Any]) -> float:
    """Return the root mean square difference, relative to the expected values."""

    def flat(runs: list[Any]) -> Tensor:
        return torch.cat([r.double().reshape(-1) for run in runs for r in run])

    want = flat(expected)
    return float((flat(found) - want).norm() / want.norm().clamp_min(1e-30))

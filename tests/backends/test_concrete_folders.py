"""Concrete's temporary folders live as long as what was compiled into them, and no longer."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fhe_fx.backends.concrete import ConcreteBackend
from fhe_fx.backends.concrete.artifact import SavedCircuit, client_specs, server_files
from fhe_fx.backends.concrete.benchmark import measure_look_ups
from fhe_fx.errors import BackendError, BitWidthError
from fhe_fx.ir import Program
from tests.programs import lower, program_from, seeded


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the system's temporary directory, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def _left(folder: Path) -> list[str]:
    """List what Python's tempfile made there, by Concrete or us; other libraries keep theirs."""
    return [p.name for p in folder.iterdir() if p.name.startswith(("fhe_fx-", tempfile.template))]


def _program(n_bits: int = 3) -> Program:
    program = program_from(torch.tanh, [(x,) for x in seeded((2, 3))], n_bits=n_bits)
    lower(program)
    return program


def test_folders_go_with_their_circuit(temporary: Path) -> None:
    circuit = ConcreteBackend().compile(_program())
    assert len(_left(temporary)) == 1
    zeros = [np.zeros((2, 3), np.int64)]
    first = circuit.simulate(zeros)
    circuit.simulate(zeros)
    assert len(_left(temporary)) == 2
    assert server_files(circuit, is_simulated=True)["sharedlib.so"]
    assert first[0].shape == (2, 3)
    del circuit
    gc.collect()
    assert _left(temporary) == []


def test_a_loaded_circuit_leaves_what_it_was_given_and_nothing_else(
    temporary: Path, tmp_path: Path
) -> None:
    circuit = ConcreteBackend().compile(_program())
    specs, folder = client_specs(circuit), tmp_path / "simulation"
    folder.mkdir()
    for name, content in server_files(circuit, is_simulated=True).items():
        (folder / name).write_bytes(content)
    del circuit
    gc.collect()
    saved = SavedCircuit(specs, tmp_path, folder)
    assert saved.simulate([np.zeros((2, 3), np.int64)])[0].shape == (2, 3)
    del saved
    gc.collect()
    assert _left(temporary) == []
    assert (folder / "sharedlib.so").exists()


def test_a_compilation_that_fails_leaves_nothing(temporary: Path) -> None:
    program = _program(8)
    program.options = replace(program.options, p_error=1e-300)
    with pytest.raises((BackendError, BitWidthError)):
        ConcreteBackend().compile(program)
    assert _left(temporary) == []


@pytest.mark.fhe
def test_the_measurement_of_a_machine_leaves_nothing(temporary: Path) -> None:
    assert measure_look_ups(2, 2).rate > 0
    gc.collect()
    assert _left(temporary) == []


def test_a_process_that_ends_leaves_nothing(tmp_path: Path) -> None:
    text = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from tests.backends.test_concrete_folders import _program, ConcreteBackend\n"
        "kept = ConcreteBackend().compile(_program())\n"
        "import os, tempfile; assert os.listdir(tempfile.gettempdir())\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", text], check=True, env=environment)
    assert _left(tmp_path) == []

"""What a run will hold, and how fast a machine is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fhe_fx.quant.lookup_cost import key_size
from fhe_fx.report.machine import Rates, machine_rates, rate_file, store_rate
from fhe_fx.report.memory import run_bytes
from tests.programs import lower, program_from, seeded


def test_a_run_holds_inputs_results_and_what_is_between() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.tanh(x) + torch.sigmoid(x)

    program = program_from(function, [(x,) for x in seeded((2, 8), n=16)])
    lower(program)
    size = key_size(8, 0.6)
    held = (run_bytes(program, [size]) - 2 * size.key_bytes) / (8 * size.words)
    assert held == 2 * 16, "one table of the sum of two tables: what it reads and what it gives"


def test_rates_of_a_machine_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not machine_rates().is_measured
    assert machine_rates().key_bytes_per_second is None
    store_rate(2e9, 5e7)
    assert machine_rates() == Rates(2e9, 5e7, True)
    rate_file().write_text('{"rate": 1e9}')  # of an older release
    assert machine_rates() == Rates(1e9, None, True)
    rate_file().write_text("[]")
    assert not machine_rates().is_measured

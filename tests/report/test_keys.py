"""What keys and ciphertexts will take."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fhe_fx.report.keys import KEYS_TABLE, key_sizes, run_bytes
from fhe_fx.report.machine import Rates, machine_rates, rate_file, store_rate
from tests.programs import lower, program_from, seeded


def test_the_table_is_in_order_and_gives_itself_back() -> None:
    rows = json.loads(KEYS_TABLE.read_text())["rows"]
    costs = [row[0] for row in rows]
    assert costs == sorted(costs)
    sizes = key_sizes({costs[0], costs[-1], math.inf})
    assert [[s.cost, s.key_bytes, s.words] for s in sizes] == [rows[0], rows[-1]]


def test_a_run_holds_inputs_results_and_what_is_between() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.tanh(x) + torch.sigmoid(x)

    program = program_from(function, [(x,) for x in seeded((2, 8), n=16)])
    lower(program)
    sizes = key_sizes([1e8])
    (size,) = sizes
    held = (run_bytes(program, sizes) - 2 * size.key_bytes) / (8 * size.words)
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

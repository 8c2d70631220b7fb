"""The table of what a look-up costs."""

from __future__ import annotations

import itertools
import math

import pytest

from fhe_fx.quant.lookup_cost import cost_table, lookup_cost


def test_it_rises_with_bits_and_falls_with_p_error() -> None:
    table = cost_table()
    p_errors = [1e-6, *table.p_errors, 0.33, 0.99]
    for low, high in itertools.pairwise(range(2, 17)):
        for p, norm in itertools.product(p_errors, (0.0, 5.5, 20.0)):
            assert lookup_cost(low, p, norm) <= lookup_cost(high, p, norm)
            assert lookup_cost(low, p, 0.0) <= lookup_cost(low, p, norm)
    for bits in range(2, 17):
        costs = [lookup_cost(bits, p) for p in sorted(p_errors)]
        assert costs == sorted(costs, reverse=True)


def test_what_was_measured_is_returned() -> None:
    table = cost_table()
    place = table.p_errors.index(0.1)
    for norm, row in zip(table.log_norms, table.by_bits[6], strict=True):
        assert lookup_cost(6, 0.1, norm) == pytest.approx(row[place])


def test_beyond_the_table_what_counts_is_noise_in_parts_of_the_range() -> None:
    # Half as wide slots, and noise twice as many of them wide: as much noise as before.
    widest = max(cost_table().by_bits)
    assert lookup_cost(widest + 1, 0.9) == pytest.approx(lookup_cost(widest, 0.8), rel=0.02)


def test_keys_exist_where_a_cost_does() -> None:
    table = cost_table()
    for bits, p, norm in itertools.product(table.by_bits, table.p_errors, table.log_norms):
        size = table.size_of(bits, p, norm)
        row = table.sizes_by_bits[bits][table.log_norms.index(norm)]
        assert size == row[table.p_errors.index(p)]
        assert (size.key_bytes > 0) == (size.words > 0)
        assert size.key_bytes > 0 or math.isinf(lookup_cost(bits, p, norm))


def test_results_cost_more_only_where_answers_are_too_noisy_for_them() -> None:
    table = cost_table()
    cheap = table.norm_for_results(8, 0.6, look_ups=2.0, results=2.0, result_bits=8)
    assert cheap == 2.0
    dear = table.norm_for_results(8, 0.6, look_ups=2.0, results=10.0, result_bits=8)
    # A look-up of as much noise would ask for parameters as exact, or more.
    assert 2.0 < dear <= 10.0
    assert lookup_cost(8, 0.6, cheap) < lookup_cost(8, 0.6, dear)
    assert table.norm_for_results(8, 0.6, 2.0, 60.0, 8) == math.inf
    assert lookup_cost(8, 0.6, math.inf) == math.inf


def test_parameters_for_noisier_sums_leave_answers_less_noisy() -> None:
    table = cost_table()
    for bits, block in table.log_deviations_by_bits.items():
        for place, _ in enumerate(table.p_errors):
            known = [
                row[place]
                for row, costs in zip(block, table.by_bits[bits], strict=True)
                if not math.isinf(costs[place])
            ]
            if len(known) == len(table.log_norms):
                assert max(known[-3:]) < min(known[:3])

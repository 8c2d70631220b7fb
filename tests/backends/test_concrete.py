"""The Concrete backend: equal to the reference in the clear, close to it with noise and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fhe_fx.backends.concrete import ConcreteBackend, ConcreteCircuit
from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.errors import BackendError, InputError
from fhe_fx.ir import Program
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.types import ValueType, as_decrypted
from fhe_fx.ir.views import Lookup, Round
from fhe_fx.quant.noise import noise_in_slots
from tests.programs import (
    Sample,
    decode,
    encode,
    lower,
    lower_with_prediction,
    program_from,
    seeded,
)


def _gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh") * 0.7


def _product(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.transpose(-2, -1)


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[list[Tensor], ...]]]] = {
    "gelu": (_gelu, [(seeded((3, 4)),)]),
    "product": (_product, [(seeded((2, 3)), seeded((2, 3), seed=1))]),
    "softmax": (_softmax, [(seeded((2, 3)),)]),
}


def _samples(name: str) -> list[Sample]:
    columns = CASES[name][1][0]
    return [tuple(row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Compiled:
    """A case, lowered at four bits and compiled."""

    program: Program
    expected: Tensor
    """Results in float on the samples."""
    noise: float
    """Deviation that roundings and bootstraps are predicted to give a result."""
    circuit: ConcreteCircuit


@cache
def _compiled(name: str) -> Compiled:
    program = program_from(CASES[name][0], _samples(name), n_bits=4)
    (expected,), (rounding,) = lower_with_prediction(program)
    # A slot's rounding has the variance 1/12, and a bootstrap's noise adds its own.
    both = math.sqrt(1 + 12 * noise_in_slots(program.options.chosen_p_error) ** 2)
    noise = both * rounding * float(expected.std())
    return Compiled(program, expected, noise, ConcreteBackend().compile(program))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gain", [1.0, 2.0, 40.0])
def test_the_clear_graph_is_the_reference_also_beyond_calibration(name: str, gain: float) -> None:
    program, circuit = _compiled(name).program, _compiled(name).circuit
    reference = ReferenceBackend().compile(program)
    for sample in _samples(name)[:4]:
        inputs = encode(program, sample, gain)
        for a, b in zip(reference.clear(inputs), circuit.clear(inputs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_values_beyond_calibration_do_not_wrap(name: str) -> None:
    """Inputs of twice the calibrated size give results within reach of the calibrated ones.

    The client clips its inputs and tables go on anti-periodically, so results stay within what the
    float function gives on ordinary and on such inputs, and six times the predicted noise.
    """
    case = _compiled(name)
    beyond = [CASES[name][0](*[2 * x for x in sample]) for sample in _samples(name)]
    both = torch.stack([*case.expected, *beyond])
    low, high = float(both.min()), float(both.max())
    for sample in _samples(name)[:8]:
        inputs = encode(case.program, sample, gain=2.0)
        for results in (case.circuit.clear(inputs), case.circuit.simulate(inputs)):
            found = decode(case.program, results)[0]
            assert float(found.min()) > low - 6 * case.noise
            assert float(found.max()) < high + 6 * case.noise


@pytest.mark.parametrize("name", CASES)
def test_noise_is_of_the_predicted_size(name: str) -> None:
    case = _compiled(name)
    errors = []
    # Four draws: the mean over the few values of one varies by a tenth.
    for expected, sample in [*zip(case.expected, _samples(name), strict=True)] * 4:
        results = case.circuit.simulate(encode(case.program, sample))
        errors.append(decode(case.program, results)[0] - expected)
    # As for the clear run: what wraps may at most double it.
    assert float(torch.stack(errors).square().mean().sqrt()) < 2 * case.noise


@pytest.mark.fhe
@pytest.mark.parametrize("name", ["product", "softmax"])
def test_encryption_agrees_with_the_clear_run(name: str) -> None:
    """One run with keys; p_error 0.1 lets a look-up read the neighbouring entry.

    The difference from the clear run is that of a simulated run, up to a factor of three, which a
    correct run exceeds with a probability far below one in a million.
    """
    _check_execution(_compiled(name), _compiled(name).circuit, name)


@pytest.mark.fhe
def test_a_circuit_runs_with_the_keys_of_another() -> None:
    case, other = _compiled("product"), _compiled("softmax").circuit
    shared = ConcreteBackend().rekeyed(case.circuit, other)
    assert shared.keyset == other.keyset
    assert other.facts.has_own_keys
    assert not shared.facts.has_own_keys
    assert shared.facts.key_bytes == other.facts.key_bytes
    _check_execution(case, shared, "product")
    keys = [c._circuit.keys._keyset for c in (shared, other)]
    assert keys[0] is keys[1]


def test_keys_that_do_not_fit_are_not_shared() -> None:
    wide = program_from(_gelu, _samples("gelu"), n_bits=7)
    lower(wide)
    own = ConcreteBackend().compile(wide)
    circuit = ConcreteBackend().rekeyed(own, _compiled("gelu").circuit)
    assert circuit is own
    assert circuit.keyset != _compiled("gelu").circuit.keyset
    assert circuit.facts.has_own_keys


def _check_execution(case: Compiled, circuit: ConcreteCircuit, name: str) -> None:
    program = case.program
    differences = []
    for sample in _samples(name)[:8]:
        inputs = encode(program, sample)
        clear = decode(program, circuit.clear(inputs))[0]
        differences.append(decode(program, circuit.simulate(inputs))[0] - clear)
    noise = float(torch.stack(differences).abs().max())
    inputs = encode(program, _samples(name)[0])
    executed = decode(program, circuit.execute(inputs))[0]
    clear = decode(program, circuit.clear(inputs))[0]
    assert float((executed - clear).abs().max()) <= 3 * noise
    assert float((executed - case.expected[0]).abs().max()) < 6 * case.noise


def test_facts_are_those_of_the_circuit() -> None:
    program, circuit = _compiled("gelu").program, _compiled("gelu").circuit
    facts = circuit.facts
    assert facts.look_ups == 12
    assert facts.max_lookup_bits == 6
    assert facts.complexity > 12 * 4e7
    assert facts.key_bytes > 1e6
    assert facts.p_error <= program.options.chosen_p_error


def test_inputs_that_do_not_fit_are_refused() -> None:
    program, circuit = _compiled("gelu").program, _compiled("gelu").circuit
    name = program.placeholders[0].name
    with pytest.raises(InputError) as shape:
        circuit.clear([np.zeros((1, 4), dtype=np.int64)])
    assert str(shape.value) == (f"region: input {name} has shape (1, 4); the circuit takes (3, 4).")
    high = program.placeholders[0].meta["type"].high
    with pytest.raises(InputError, match=f"holds 0 to {high + 1}; the circuit takes"):
        circuit.clear([np.eye(3, 4, dtype=np.int64) * (high + 1)])


def test_the_reference_refuses_what_it_has_not() -> None:
    program = program_from(_gelu, _samples("gelu"))
    with pytest.raises(BackendError, match="region is not lowered to integers; run the pipeline"):
        ReferenceBackend().compile(program)
    lower(program)
    circuit = ReferenceBackend().compile(program)
    with pytest.raises(BackendError, match="no noise to simulate"):
        circuit.simulate([])
    with pytest.raises(BackendError, match="does not encrypt"):
        circuit.execute([])


def test_a_result_beyond_its_bits_is_right_for_half_as_many_more_and_then_wraps() -> None:
    """The client reads the bit above the message, under encryption as in the reference."""
    x = torch.linspace(-1, 1, 16).view(2, 8)
    opposed = [(torch.cat([x, -c * x], -1),) for c in (0.4, 0.5, 0.6)]
    program = program_from(
        lambda x: torch.tanh(x[..., :8]) + torch.tanh(x[..., 8:]), opposed,
        result_bits=8, p_error=0.1,
    )  # fmt: skip
    lower(program)
    (result,) = program.results
    value: ValueType = result.meta["type"]
    circuit, reference = ConcreteBackend().compile(program), ReferenceBackend().compile(program)
    tables = [Lookup.of(n).tables for n in program.calls(LOOKUP)]
    assert len(tables) == 2
    unit = 1 << Round.of(result).lsbs
    step = max(float(t.diff(dim=-1).abs().max()) for t in tables) / unit
    assert step < 16
    largest = []
    for second in (-0.5, 0.1, 1.0):
        inputs = encode(program, (torch.cat([x, second * x], -1),))
        (expected,) = reference.clear(inputs)
        largest.append(int(np.abs(expected).max()))
        np.testing.assert_array_equal(circuit.clear(inputs)[0], expected)
        for found in (circuit.simulate(inputs)[0], circuit.execute(inputs)[0]):
            # Each of the two may read a neighbour; a wrap that the reference does not show would
            # move the sum by 256.
            assert np.abs(as_decrypted(found - expected, 8)).max() <= 2 * step + 1
    assert largest[0] <= value.high + 1 < largest[1]
    assert max(largest) <= 2 * value.high + 2

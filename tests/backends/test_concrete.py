"""The Concrete backend: equal to the reference in the clear, close to it with noise and keys."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fhe_fx.backends.concrete import ConcreteBackend, ConcreteCircuit
from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.errors import BackendError, InputError
from fhe_fx.ir import Program
from tests.programs import Sample, decode, encode, lower, program_from, seeded


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


def _compiled(name: str, n_bits: int = 4) -> tuple[Program, list[Tensor], ConcreteCircuit]:
    program = program_from(CASES[name][0], _samples(name), n_bits=n_bits)
    expected = lower(program)
    return program, expected, ConcreteBackend().compile(program)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gain", [1.0, 2.0, 40.0])
def test_the_clear_graph_is_the_reference_also_beyond_calibration(name: str, gain: float) -> None:
    program, _, circuit = _compiled(name)
    reference = ReferenceBackend().compile(program)
    for sample in _samples(name)[:4]:
        inputs = encode(program, sample, gain)
        for a, b in zip(reference.clear(inputs), circuit.clear(inputs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_values_beyond_calibration_do_not_wrap(name: str) -> None:
    """Inputs of twice the calibrated size give results within reach of the calibrated ones.

    The client clips its inputs and tables go on anti-periodically, so results stay within what the
    float function gives on ordinary and on such inputs, plus the noise of the look-ups that make
    one result: a quarter of the range.
    """
    program, expected, circuit = _compiled(name)
    beyond = [CASES[name][0](*[2 * x for x in sample]) for sample in _samples(name)]
    both = torch.stack([*expected[0], *beyond])
    low, high = float(both.min()), float(both.max())
    reach = 0.25 * float(expected[0].max() - expected[0].min())
    for sample in _samples(name)[:8]:
        inputs = encode(program, sample, gain=2.0)
        clear, simulated = (
            decode(program, results)[0]
            for results in (circuit.clear(inputs), circuit.simulate(inputs))
        )
        for found in (clear, simulated):
            assert float(found.min()) > low - reach
            assert float(found.max()) < high + reach


@pytest.mark.parametrize("name", CASES)
def test_noise_is_of_the_size_of_a_slot(name: str) -> None:
    program, expected, circuit = _compiled(name)
    spread = float(expected[0].std())
    errors = []
    for k, sample in enumerate(_samples(name)):
        inputs = encode(program, sample)
        simulated = decode(program, circuit.simulate(inputs))[0]
        errors.append(simulated - expected[0][k])
    assert float(torch.stack(errors).square().mean().sqrt()) < 0.2 * spread


@pytest.mark.fhe
@pytest.mark.parametrize("name", ["product", "softmax"])
def test_encryption_agrees_with_the_clear_run(name: str) -> None:
    """One run with keys; p_error 0.1 lets a look-up read the neighbouring entry.

    The difference from the clear run is that of a simulated run, up to a factor of three, which a
    correct run exceeds with a probability far below one in a million.
    """
    program, expected, circuit = _compiled(name)
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
    assert float((executed - expected[0][0]).abs().max()) < float(expected[0].std())


def test_facts_are_those_of_the_circuit() -> None:
    program, _, circuit = _compiled("gelu")
    facts = circuit.facts
    assert facts.look_ups == 12
    assert facts.max_lookup_bits == 6
    assert facts.complexity > 12 * 4e7
    assert facts.key_bytes > 1e6
    assert facts.p_error <= program.options.p_error


def test_inputs_that_do_not_fit_are_refused() -> None:
    program, _, circuit = _compiled("gelu")
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

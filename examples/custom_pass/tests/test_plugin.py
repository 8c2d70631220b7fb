"""The plugin as it is installed: found by name, exact in float, priced, named when it declines."""

from __future__ import annotations

import torch
from fhe_fx_flat_softmax.snake import SNAKE
from torch import Tensor

import fhe_fx
from fhe_fx import plugins
from fhe_fx.backends import get_backend
from fhe_fx.extend import parse_pipeline
from fhe_fx.ir import Program
from fhe_fx.passes import Pipeline, get_pass
from fhe_fx.passes.normalize import Normalize
from fhe_fx.testing import assert_cost, assert_equivalent, program_from, seeded

PIPELINE = parse_pipeline("default,flat-softmax@before:lower-softmax")


def normal(function: object, *shape: int) -> Program:
    program = program_from(function, [(x,) for x in seeded(shape)])  # type: ignore[arg-type]
    Pipeline((Normalize(),)).run(program)
    return program


def attention(x: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_it_is_found_by_name() -> None:
    flat = get_pass("flat-softmax")
    assert str(plugins.provider(flat)) == "fhe-fx-flat-softmax 0.1.0"
    assert get_backend("price-list").name == "price-list"
    assert plugins.faults() == []


def test_it_is_exact() -> None:
    for function, shape in ((attention, (1, 2, 5, 4)), (lambda x: x.softmax(-1), (1, 3, 6))):
        before, after = normal(function, *shape), normal(function, *shape)
        (record,) = Pipeline((get_pass("flat-softmax")(),)).run(after)
        assert record.has_changed
        assert "softmax" not in str(after).replace("masked_softmax_", "")
        assert_equivalent(before, after)


def test_what_it_leaves_alone() -> None:
    for function, reason in (
        (lambda x: x.log_softmax(-1), "it is a log-softmax"),
        (lambda x: x.softmax(-1), "6 live keys, max_live=5"),
    ):
        program = normal(function, 1, 3, 6)
        (record,) = Pipeline((get_pass("flat-softmax")(max_live=5),)).run(program)  # type: ignore[call-arg]
        assert not record.has_changed
        assert [n.reason for n in program.notes] == [reason]


def test_a_softmax_of_six_keys_costs_thirteen_look_ups() -> None:
    samples = [(x,) for x in seeded((1, 1, 6))]
    program = program_from(lambda x: x.softmax(-1), samples, n_bits=4, p_error=0.1)
    PIPELINE.run(program)
    assert_cost(program, look_ups=13, bits=6)
    facts = get_backend("price-list").compile(program).facts
    assert facts is not None
    assert (facts.look_ups, facts.complexity) == (13, 13 * 9.7e7)


class Periodic(torch.nn.Module):
    """A network with the operator that fhe_fx does not know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = SNAKE(self.body(x), 1.5)
        return y


def test_its_operator_runs_on_integers() -> None:
    get_pass("flat-softmax")  # the operator is registered when the plugin is loaded

    steps = torch.linspace(0, 6, 48)[:, None] + torch.arange(6)
    inputs = [row[None] for row in steps.sin() * (1 + 0.1 * torch.arange(6))]
    model = torch.nn.Sequential(Periodic())
    encrypted = fhe_fx.encrypt_submodule(model, "0", n_bits=6, p_error=0.1, calibration=inputs[::2])
    fhe_fx.set_mode(encrypted, "clear")
    with torch.no_grad():
        expected = torch.cat([model(x) for x in inputs[1::2]])
        found = torch.cat([encrypted(x) for x in inputs[1::2]])
    assert float((found - expected).norm() / expected.norm()) < 0.1  # of quantization, at 6 bits
    assert fhe_fx.report(encrypted, backend="price-list").regions[0].look_ups == 4

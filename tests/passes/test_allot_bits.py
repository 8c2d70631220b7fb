"""`allot-bits`: a width for every look-up and a `p_error`, at the least cost within a budget."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from fhe_fx import Options
from fhe_fx.backends.reference.batch import run_batch
from fhe_fx.errors import OptionsError, PassError
from fhe_fx.ir import Program
from fhe_fx.ir import dialect as d
from fhe_fx.passes import Pipeline, default_pipeline
from fhe_fx.passes.allot_bits import AllotBits
from fhe_fx.quant.lookup_cost import cost_table, lookup_cost
from fhe_fx.quant.lookup_noise import LookupNoise
from fhe_fx.quant.noise import lookup_variance
from fhe_fx.quant.noise_level import NoiseLevel
from fhe_fx.quant.response import lookup_responses, result_response
from fhe_fx.report import report_on
from tests.programs import decode, encode, lower, program_from, relative_error, run_all, seeded

SAMPLES = [(x,) for x in seeded((4, 6), n=48)]
UNSEEN = [(x,) for x in seeded((4, 6), n=64, seed=5)]
W = seeded((6, 6), n=1, seed=9)[0]
WIDE = 0.3 * seeded((6, 24), n=1, seed=8)[0]


def _function(x: Tensor) -> Tensor:
    return nn.functional.gelu(torch.tanh(x @ W) @ W) + 0.003 * torch.exp(x @ WIDE).view(
        *x.shape, 4
    ).sum(-1)


def _allotted(allot: AllotBits = AllotBits(), **options: object) -> Program:  # noqa: B008
    """Run the pipeline up to and with `allot-bits`."""
    program = program_from(_function, SAMPLES, **options)  # type: ignore[arg-type]
    passes = tuple(default_pipeline())
    Pipeline((*passes[: [p.name for p in passes].index("allot-bits")], allot)).run(program)
    return program


def _bits(program: Program) -> dict[str, int]:
    return {n.name: n.meta["lookup_bits"] for n in program.maps()}


def _squared_error(program: Program) -> float:
    """Return what look-ups add to the results' variance, in parts of it."""
    p_error, responses = program.options.chosen_p_error, lookup_responses(program)
    return sum(
        responses[n.name]
        * lookup_variance(n.meta["lookup_bits"], p_error)
        / int(n.meta["readings"])
        for n in program.maps()
    )


def _error(program: Program) -> float:
    """Return the predicted error of the results, in parts of their deviation."""
    bits, p_error = program.options.chosen_result_bits, program.options.chosen_p_error
    rounding = result_response(program) * lookup_variance(bits, p_error)
    return math.sqrt(_squared_error(program) + rounding)


def _cost(program: Program) -> float:
    p_error = program.options.chosen_p_error
    return sum(
        int(n.meta["readings"])
        * math.prod(d.shape_of(n))
        * lookup_cost(
            n.meta["lookup_bits"], p_error, _norm(program, n.meta["lookup_bits"], p_error)
        )
        for n in program.maps()
    )


def _norm(program: Program, bits: int, p_error: float) -> float:
    return NoiseLevel.of(program).at(bits, p_error, program.options.chosen_result_bits)


def _noisy_error(program: Program) -> float:
    """Return the error of an integer program with noise on inputs that calibration did not see."""
    (expected,) = run_all(program_from(_function, SAMPLES), UNSEEN)
    encoded = [torch.stack(list(map(torch.from_numpy, q))) for q in zip(
        *[encode(program, s) for s in UNSEEN], strict=True
    )]  # fmt: skip
    noise = LookupNoise.of(program.options.chosen_p_error, 0)
    (found,) = run_batch(program, encoded, noise=noise)
    decoded = torch.stack([decode(program, [q.numpy()])[0] for q in found])
    return relative_error(expected, decoded)


def _allowed(program: Program, n_bits: int) -> float:
    """Return the squared error of a default budget."""
    rounding = sum(lookup_responses(program).values()) * lookup_variance(n_bits + 2, 0.0)
    return AllotBits().part_of_rounding * rounding


def test_a_given_p_error_leaves_all_look_ups_at_two_bits_more_than_an_activation_has() -> None:
    program = _allotted(n_bits=4, p_error=0.1)
    assert set(_bits(program).values()) == {6}
    assert program.options.p_error == 0.1


@pytest.mark.parametrize("n_bits", [2, 4, 6])
def test_noise_and_rounding_together_err_as_rounding_alone_may(n_bits: int) -> None:
    program = _allotted(n_bits=n_bits)
    assert program.options.p_error in cost_table().p_errors
    assert _squared_error(program) <= _allowed(program, n_bits)


def test_nothing_of_one_width_that_keeps_to_the_budget_is_cheaper() -> None:
    once = AllotBits(most_readings=1)
    program = _allotted(once, n_bits=4)
    responses = lookup_responses(program)
    look_ups = sum(math.prod(d.shape_of(n)) for n in program.maps())
    allowed = _allowed(program, 4)
    uniform = [
        look_ups * lookup_cost(bits, p_error, _norm(program, bits, p_error))
        for bits in range(2, 17)
        for p_error in once.p_errors
        if sum(responses.values()) * lookup_variance(bits, p_error) <= allowed
    ]
    assert _cost(program) <= 1.03 * min(uniform)  # the table is as exact


@pytest.mark.parametrize(("spent", "kept"), [(0.8, 0.6), (2.0, 0.5)])
def test_what_was_left_out_counts_against_what_is_allowed(spent: float, kept: float) -> None:
    """Look-ups have the rest of the square, and a quarter of it whatever was spent."""
    program = program_from(_function, SAMPLES, max_error=0.1)
    passes = tuple(default_pipeline())
    Pipeline(passes[: [p.name for p in passes].index("allot-bits")]).run(program)
    program.left_out = (spent * 0.095) ** 2
    AllotBits().run(program)
    assert _squared_error(program) <= (kept * 0.095) ** 2
    assert _squared_error(program) < _squared_error(_allotted(max_error=0.1))


@pytest.mark.parametrize("max_error", [0.2, 0.05])
def test_the_error_of_look_ups_is_what_was_allowed(max_error: float) -> None:
    predicted = _error(_allotted(max_error=max_error))
    assert predicted <= max_error
    program = program_from(_function, SAMPLES, max_error=max_error, input_bits=12)
    lower(program)
    # Inputs and weights are near exact, so look-ups make all of it: what was predicted.
    assert 0.75 * predicted < _noisy_error(program) <= max_error


def test_a_complexity_that_may_be_spent_buys_precision() -> None:
    costs = (8e9, 16e9, 32e9)
    programs = [_allotted(max_cost=c) for c in costs]
    assert all(_cost(p) <= c for p, c in zip(programs, costs, strict=True))
    errors = [_error(p) for p in programs]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1]


def test_a_second_width_is_taken_where_it_saves_enough() -> None:
    once = AllotBits(most_readings=1, least_saving=0.2)
    program = _allotted(once, n_bits=4)
    widths = set(_bits(program).values())
    assert len(widths) == 2  # those of the exponential hardly matter
    (exp,) = (n for n in program.maps() if "exp" in str(d.map_of(n).graph))
    assert exp.meta["lookup_bits"] == min(widths)
    assert len(set(_bits(_allotted(once, n_bits=4, most_widths=1)).values())) == 1


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({"max_error": 1e-9}, r"max_error=1e-09 cannot be kept; look-ups of 16 bits err by \d"),
        ({"max_cost": 10.0}, r"max_cost=10 cannot be kept; the cheapest widths cost \d"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(budget: dict[str, float], text: str) -> None:
    with pytest.raises(PassError, match=text):
        _allotted(AllotBits(), **budget)


def test_rules_win_an_exact_one_over_expressions() -> None:
    rules = (("re:.*exp.*", 5), ("re:map.*", 7))
    program = _allotted(n_bits=4, p_error=0.1, rules=rules)
    lowered = program_from(_function, SAMPLES, n_bits=4, p_error=0.1, rules=rules)
    lower(lowered)
    found = {n.function: n.input_bits for n in report_on([(lowered, None)]).regions[0].nodes}
    assert set(_bits(program).values()) == set(found.values()) == {5, 7}
    assert all((bits == 5) == ("exp" in function) for function, bits in found.items())
    name = next(f for f in found if "exp" in f)
    exact = _allotted(n_bits=4, p_error=0.1, rules=(*rules, (name, 9)))
    assert sorted(set(_bits(exact).values())) == [7, 9]


def test_a_width_chosen_before_is_kept() -> None:
    program = program_from(_function, SAMPLES, n_bits=4)
    passes = tuple(default_pipeline())
    place = [p.name for p in passes].index("allot-bits")
    Pipeline(passes[:place]).run(program)
    first = program.maps()[0]
    first.meta["lookup_bits"] = 9
    Pipeline((passes[place],)).run(program)
    assert first.meta["lookup_bits"] == 9


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_error": 0.0}, "max_error=0.0 is not a positive number"),
        ({"max_cost": math.inf}, "max_cost=inf is not a positive number"),
        ({"max_error": 0.1, "max_cost": 1e9}, "max_error or max_cost, not both"),
        ({"rules": (("exp", 40),)}, r"rules: 'exp'=40 is outside \[1, 16\]"),
        ({"rules": (("re:(", 4),)}, r"rules: 're:\(' is no regular expression"),
        ({"rules": ("exp",)}, "rules: 'exp' is not a pattern and a width"),
    ],
)
def test_bad_budgets_are_refused_when_built(options: dict[str, object], text: str) -> None:
    with pytest.raises(OptionsError, match=text):
        Options(**options)  # type: ignore[arg-type]


def test_the_look_ups_that_make_most_of_the_error_are_read_several_times() -> None:
    once = dataclasses.replace(AllotBits(), most_readings=1)
    programs = []
    for allot in (once, AllotBits()):
        program = program_from(_function, SAMPLES, n_bits=4, most_widths=1)
        passes = Pipeline(tuple(allot if p.name == allot.name else p for p in default_pipeline()))
        passes.run(program)
        programs.append(program)
    reports = [report_on([(p, None)]).regions[0] for p in programs]
    assert {n.readings for n in reports[0].nodes} == {1}
    assert {n.readings for n in reports[1].nodes} > {1}
    before, after = reports
    assert before.predicted_error is not None
    assert after.predicted_error is not None
    saved = 1 - (after.predicted_error / before.predicted_error) ** 2
    assert saved > after.look_ups / before.look_ups - 1
    # And so it is with noise, on inputs that calibration did not see.
    assert _noisy_error(programs[1]) < _noisy_error(programs[0])


@pytest.mark.parametrize("budget", [{"max_error": 0.03}, {"max_cost": 1.2e10}])
def test_a_budget_buys_more_where_look_ups_may_be_read_repeatedly(
    budget: dict[str, float],
) -> None:
    found = []
    for most_readings in (1, 4):
        allot = AllotBits(most_readings=most_readings)
        program = _allotted(allot, most_widths=1, **budget)
        found.append((_error(program), _cost(program)))
    once, repeatedly = found
    if "max_error" in budget:
        assert max(once[0], repeatedly[0]) <= budget["max_error"]
        assert repeatedly[1] < once[1]
    else:
        # What a mean of answers adds to the noise of sums counts: no more than allowed is spent.
        assert max(once[1], repeatedly[1]) <= budget["max_cost"]
        assert repeatedly[0] <= once[0]

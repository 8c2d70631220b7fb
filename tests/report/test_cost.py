"""Predicted costs against those of compiled circuits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.backends.concrete import ConcreteBackend
from fhe_fx.options import Options
from fhe_fx.quant.noise_level import NoiseLevel
from fhe_fx.report import RegionCost, report_on
from tests.models import shipped_gpt2, shipped_sentences
from tests.programs import lower, program_from, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pkg_resources:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pkg_resources:DeprecationWarning"),
]


def _shipped(target: str, heads: list[int] | None, **options: object) -> RegionCost:
    calibration = [s[:, :4] for s in shipped_sentences() if s.shape[1] >= 4][:16]
    encrypted = fhe_fx.encrypt_submodule(
        shipped_gpt2(), target, heads=heads, max_tokens=4, calibration=calibration,
        options=Options(**options),  # type: ignore[arg-type]
    )  # fmt: skip
    fhe_fx.compile(encrypted, verbose=False)
    (module,) = encrypted_modules(encrypted)
    return report_on([(module.region.program, module.region.facts)]).regions[0]


def _near(cost: RegionCost) -> None:
    assert cost.complexity is not None
    assert cost.predicted_complexity == pytest.approx(cost.complexity, rel=0.15)
    assert cost.look_ups == sum(n.look_ups for n in cost.nodes)


def _keys_near(cost: RegionCost) -> None:
    assert cost.key_bytes is not None
    assert cost.predicted_key_bytes == pytest.approx(cost.key_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("target", "heads", "options"),
    [
        ("h.0.attn", [0], {}),
        ("h.0.attn", [0], {"p_error": 0.1}),
        ("h.0.attn", None, {}),
        ("h.0.mlp", None, {}),
        ("h.0", None, {}),
    ],
)
def test_complexity_is_predicted(
    target: str, heads: list[int] | None, options: dict[str, object]
) -> None:
    cost = _shipped(target, heads, **options)
    _near(cost)
    _keys_near(cost)


def test_a_second_bootstrap_key_of_the_same_parameters_comes_besides() -> None:
    """Concrete may make one for a part of a circuit; nothing tells before it is compiled."""
    cost = _shipped("h.0.attn", [0], n_bits=3)
    _near(cost)
    assert cost.predicted_key_bytes is not None
    assert cost.key_bytes is not None
    assert cost.predicted_key_bytes < cost.key_bytes


@pytest.mark.parametrize("weights", [0.0, 1.0])
def test_weights_on_answers_of_look_ups_are_priced(weights: float) -> None:
    w = seeded((64, 32), n=1, seed=3)[0]

    def function(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return torch.tanh(y @ w) if weights else torch.tanh(y[..., :32] + y[..., 32:])

    program = program_from(function, [(x,) for x in seeded((2, 64), n=16)], n_bits=4)
    lower(program)
    _near(report_on([(program, ConcreteBackend().compile(program).facts)]).regions[0])
    norm = NoiseLevel.of(program).look_ups
    assert norm > 5 if weights else norm == pytest.approx(0.5)


def _sum_of_tables(x: Tensor) -> Tensor:
    return torch.exp(x).sum(-1)


def _linear_of_inputs(x: Tensor) -> Tensor:
    return torch.exp(x @ torch.ones(8, 3))


@pytest.mark.parametrize(
    ("function", "squared"), [(_sum_of_tables, 8.0), (_linear_of_inputs, 1.0), (nn.ReLU(), 1.0)]
)
def test_norms_are_those_of_sums_of_answers(
    function: Callable[[Tensor], Tensor], squared: float
) -> None:
    program = program_from(function, [(x,) for x in seeded((2, 8), n=16)])
    lower(program)
    assert 2 ** (2 * NoiseLevel.of(program).results) == pytest.approx(squared)


def test_shares_add_up_to_one() -> None:
    region_report = fhe_fx.report(
        fhe_fx.encrypt_submodule(
            shipped_gpt2(), "h.0.mlp", max_tokens=3,
            calibration=[s[:, :3] for s in shipped_sentences() if s.shape[1] >= 3][:8],
        )
    )  # fmt: skip
    (region,) = region_report.regions
    assert sum(n.share for n in region.nodes) == pytest.approx(1)
    assert region.predicted_error is not None
    of_results = 1 - sum(n.error_share or 0 for n in region.nodes)
    assert 0 < of_results < 1
    assert region.rounding_share == pytest.approx(of_results)
    said = f"rounded results about {100 * region.predicted_error:.2g} % of"
    assert said in str(region_report)
    assert region.complexity is None
    assert f"complexity about {region.predicted_complexity:.1e}".replace("+", "") in region.line()

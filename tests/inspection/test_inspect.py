"""Float beside integer: which values are compared, what is counted, what is pointed out."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.errors import InputError, OptionsError, PassError, TargetError
from fhe_fx.inspection import Inspection, RegionErrors
from fhe_fx.inspection.twin import twins_of
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP
from tests.models import FEW, Mlp, mlp_inputs, tiny_gpt2, tiny_llama, token_inputs


def _mlp(n_bits: int = 6, **changes: Any) -> Any:
    return fhe_fx.encrypt_submodule(
        Mlp(), "inner", n_bits=n_bits, calibration=mlp_inputs(128), **changes
    )


def _others(n: int = 8, gain: float = 1.0) -> list[Tensor]:
    """Return inputs that calibration has not seen."""
    generator = torch.Generator().manual_seed(9)
    return [gain * (0.5 * torch.randn(1, 6, generator=generator) + 0.1) for _ in range(n)]


@pytest.fixture(scope="module")
def found() -> Inspection:
    return fhe_fx.inspect(_mlp(), _others())


@pytest.fixture(scope="module")
def attention() -> Any:
    """Not to be changed but for its mode."""
    return fhe_fx.encrypt_submodule(
        tiny_gpt2(), "h.0.attn", n_bits=4, max_tokens=(2, 4), options=FEW
    )


@pytest.mark.parametrize("model", [tiny_gpt2(is_base=True), tiny_llama()], ids=["gpt2", "llama"])
def test_every_node_has_the_float_value_that_it_stands_for(model: Any) -> None:
    """At eight bits each integer means its float value within a tenth of its size.

    Roundings are a few thousandths and add up; with the value of another node it would be off by
    about its whole size.
    """
    path = "h.0.attn" if hasattr(model, "h") else "layers.0.self_attn"
    calls = [{"input_ids": ids} for ids in token_inputs(16, 2)]
    encrypted = fhe_fx.encrypt_submodule(model, path, n_bits=8, input_bits=12, calibration=calls)
    region = encrypted_modules(encrypted)[0].region
    twins = twins_of(region)
    assert str(twins.integers) == str(region.program)  # the tags are gone, the rest is the same
    zeros = {n.name for n in twins.integers.encrypted() if "is_zero" in n.meta}
    assert set(twins.counterpart) == {n.name for n in twins.integers.encrypted()} - zeros
    (errors,) = fhe_fx.inspect(encrypted, calls)  # on other inputs, values are clipped
    assert {n.node for n in errors.nodes} == set(twins.counterpart)
    # What went out of its range is off for another reason.
    inside = [n for n in errors.nodes if not n.outside]
    assert len(inside) > 0.8 * len(errors.nodes)
    assert max(n.relative_error for n in inside) < 0.1


def test_figures_are_those_of_the_two_programs(found: Inspection) -> None:
    region = encrypted_modules(_mlp())[0].region
    inputs = [tuple(x.float() for x in (row,)) for row in _others()]
    results = [region.run_circuit(x, "clear")[0] for x in inputs]
    exact = [region.captured(*x)[0] for x in inputs]
    ours, theirs = torch.stack(results).double(), torch.stack(exact).double()
    relative = float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())
    (errors,) = found
    assert errors.result_errors == pytest.approx((relative,), rel=1e-4)
    last = errors.nodes[-1]
    assert last.float_low == pytest.approx(float(theirs.min()), rel=1e-4)
    assert last.float_high == pytest.approx(float(theirs.max()), rel=1e-4)
    first = errors.nodes[0]
    assert (first.operator, first.shape, first.values) == ("input", (1, 6), 8 * 6)
    # The rounding of inputs to 12 bits, a twelfth of a step squared, and no clipped value.
    assert first.error == pytest.approx((first.high - first.low) / 4095 / 12**0.5, rel=0.4)


def test_noise_is_that_of_the_circuit(found: Inspection) -> None:
    """With noise, errors begin behind the first look-ups, and the results' is what encryption has.

    Concrete's own simulation of the circuit draws another noise: the mean over four draws of it
    varies by a twentieth. Without noise the error would be smaller by a sixth at least.
    """
    encrypted = _mlp(n_bits=3, p_error=0.7)
    others = _others(48)
    (clear,) = fhe_fx.inspect(encrypted, others)
    (noisy,) = fhe_fx.inspect(encrypted, others, mode="simulate")
    assert (clear.mode, noisy.mode) == ("clear", "simulate")
    assert ", with noise, 48 inputs" in str(noisy)
    assert [n.node for n in noisy.nodes] == [n.node for n in clear.nodes]
    first = next(k for k, n in enumerate(clear.nodes) if n.look_ups)
    assert noisy.nodes[:first] == clear.nodes[:first]
    assert noisy.nodes[first].error > clear.nodes[first].error
    region = encrypted_modules(encrypted)[0].region
    ours = torch.cat([region.run_circuit((x,), "simulate")[0] for x in others * 4]).double()
    exact = torch.cat([region.captured(x)[0] for x in others * 4]).double()
    simulated = float((ours - exact).norm() / exact.norm())
    assert noisy.result_errors[0] == pytest.approx(simulated, rel=0.15)
    assert noisy.result_errors[0] > 1.2 * clear.result_errors[0]


def test_costs_and_bits_are_those_of_the_report(found: Inspection) -> None:
    report = fhe_fx.report(_mlp()).regions[0]
    (errors,) = found
    by_name = {n.node: n for n in errors.nodes if n.look_ups}
    assert {n.node: (n.look_ups, n.share) for n in report.nodes} == {
        name: (n.look_ups, n.cost) for name, n in by_name.items()
    }
    assert {n.node: n.lookup_bits for n in by_name.values()} == {
        n.node: n.input_bits for n in report.nodes
    }
    read = {name for n in by_name.values() for name in n.reads}
    for n in errors.nodes:
        assert (n.slots is not None) == (n.node in read)
        if n.slots is not None and n.slot is not None:
            assert n.slots == pytest.approx(n.error / n.slot, rel=0.5)


def test_the_first_node_above_the_threshold_is_named() -> None:
    (errors,) = fhe_fx.inspect(_mlp(n_bits=2), _others(), threshold=0.05)
    first = errors.first
    assert first is not None
    assert first.relative_error > 0.05
    before = errors.major[: errors.major.index(first)]
    assert before
    assert all(n.relative_error <= 0.05 for n in before)
    assert f"first above 0.05: {first.node} ({first.operator})" in str(errors)
    assert "*" in str(errors)
    (fine,) = fhe_fx.inspect(_mlp(n_bits=8), _others(), threshold=0.5)
    assert fine.first is None
    assert "first above" not in str(fine)
    assert fine.as_dict()["first"] is None


def test_values_beyond_calibration_are_counted_and_said() -> None:
    model = _mlp()
    (usual,) = fhe_fx.inspect(model, _others(32))
    assert usual.warnings == ()
    found = fhe_fx.inspect(model, _others(32, gain=4.0))
    (far,) = found
    place = encrypted_modules(model)[0].region.program.placeholders[0]
    t = place.meta["type"]
    whole = ((torch.stack(_others(32, gain=4.0)).double() - t.offset) / t.scale).round()
    clipped = int(((whole < t.low) | (whole > t.high)).sum())
    assert far.nodes[0].outside == clipped > 0
    (warning,) = far.warnings
    assert "look-ups or inputs had more than 0.1% of their values outside the cal" in warning
    assert f"the worst, encrypted input {place.name}, {clipped / 192:.2%} of 192 (cal" in warning
    assert found.warnings == [f"inner: {warning}"]


def test_inputs_of_calibration_are_said() -> None:
    (errors,) = fhe_fx.inspect(_mlp(), [*mlp_inputs(128)[:3], *_others(2)])
    assert errors.warnings == (
        "3 of the 5 inputs are calibration inputs, for which ranges were made. Use other ones.",
    )


def test_modes_are_left_as_they_are(attention: Any) -> None:
    fhe_fx.set_mode(attention, "clear")
    before = [copy.copy(part.mode) for part in encrypted_modules(attention)]
    with pytest.raises(InputError, match="5 rows in axis 1"):
        fhe_fx.inspect(attention, [torch.zeros(1, 5, dtype=torch.int64)])
    assert [part.mode for part in encrypted_modules(attention)] == before
    assert not attention.transformer.h[0].attn._forward_pre_hooks


def test_each_length_of_a_ladder_is_inspected_where_it_runs(attention: Any) -> None:
    rows = [{"input_ids": ids[:, :n]} for ids in token_inputs(6, 4) for n in (2, 3)]
    found = fhe_fx.inspect(attention, rows)
    assert [(r.tokens, r.n_samples) for r in found] == [(2, 6), (4, 6)]
    alone = fhe_fx.inspect(attention, rows[0]["input_ids"])
    assert [r.tokens for r in alone] == [2]


def test_it_is_data(found: Inspection) -> None:
    held = json.loads(found.to_json())
    assert held == json.loads(json.dumps(found.as_dict()))
    (region,) = held["regions"]
    assert region["name"] == "inner"
    assert [n["node"] for n in region["nodes"]] == [n.node for n in found.regions[0].nodes]
    lines = str(found).splitlines()
    error = found.regions[0].result_errors[0]
    assert lines[0].startswith(f"inner: relative error {error:.3f}, 8 inputs")
    assert (
        len([n for n in found.regions[0].nodes if not n.is_minor])
        == len(lines)
        - 1
        - sum("first above" in line or "outside their range" in line for line in lines)
        - 1
    )  # the heads of the table


class _Page(HTMLParser):
    """Collects what a page holds, and checks that each tag is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.counts: dict[str, int] = {}
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [given["href"] or ""] if "href" in given else []
        self.loads += [v or "" for k, v in attrs if k == "src"]
        if tag not in {"meta", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parsed(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_shows_every_node_and_needs_nothing_else(attention: Any, tmp_path: Path) -> None:
    found = fhe_fx.inspect(attention, [{"input_ids": ids} for ids in token_inputs(4, 4)])
    path = found.save_html(tmp_path / "page.html")
    page = _parsed(path.read_text(encoding="utf-8"))
    (region,) = found
    assert page.counts["tr"] == 1 + len(region.major)
    assert page.counts["rect"] == page.counts["a"] < len(region.major)
    assert page.counts["path"] >= page.counts["rect"] - 2
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.removeprefix("#") in page.ids for link in page.links)
    assert page.loads == []
    assert "script" not in page.counts
    assert "http" not in path.read_text(encoding="utf-8")


def test_names_cannot_break_the_page(found: Inspection) -> None:
    (region,) = found
    nodes = [replace(n, operator='<b>&"', module_path="<script>") for n in region.nodes]
    odd = RegionErrors(
        "<i>part</i>",
        None,
        1,
        tuple(nodes),
        region.result_errors,
        region.threshold,
        "clear",
        ("<u>",),
    )
    page = _parsed(Inspection((odd,)).html())
    assert not {"b", "i", "u", "script"} & set(page.counts)


def test_refuses_what_cannot_be_inspected(attention: Any) -> None:
    with pytest.raises(TargetError, match=r"^Mlp has no encrypted part\. Use the model that"):
        fhe_fx.inspect(Mlp(), _others())
    with pytest.raises(InputError) as caught:
        fhe_fx.inspect(attention, [])
    assert str(caught.value) == "There is no input to inspect the model with. Give some."
    with pytest.raises(InputError, match="The inputs are a str; give a list of model inputs"):
        fhe_fx.inspect(attention, "text")
    wrong: list[Any] = [0.0, -1, float("nan"), "much"]
    for threshold in wrong:
        with pytest.raises(OptionsError) as refused:
            fhe_fx.inspect(attention, [], threshold=threshold)
        assert str(refused.value) == (f"threshold={threshold!r} is not a positive number. Try 0.1.")


class _Unused(nn.Module):
    """A part that some inputs do not reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] > 1 else self.part(x)


def test_an_unknown_mode_is_refused(attention: Any) -> None:
    with pytest.raises(OptionsError) as caught:
        fhe_fx.inspect(attention, token_inputs(1, 4), mode="simulated")
    assert str(caught.value) == (
        "mode='simulated' is not one of clear, simulate. Did you mean 'simulate'?"
    )


def test_inputs_that_reach_no_part_are_refused() -> None:
    model = fhe_fx.encrypt_submodule(_Unused(), "part", calibration=mlp_inputs())
    with pytest.raises(InputError, match="No encrypted part was called on these inputs"):
        fhe_fx.inspect(model, torch.ones(2, 6))


def test_a_pipeline_without_integers_is_refused() -> None:
    region = encrypted_modules(_mlp())[0].region
    shorter = replace(region, pipeline=region.pipeline.drop("lower-to-integers"))
    with pytest.raises(PassError) as caught:
        twins_of(shorter)
    assert str(caught.value) == "inner: no pass of the pipeline lowers to integers."
    assert any(d.is_call(n, LOOKUP) for n in twins_of(region).integers.encrypted())

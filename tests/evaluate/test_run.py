"""Whole evaluations: figures equal those of the model itself, files resume, warnings warn."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import fhe_fx
from fhe_fx import Options
from fhe_fx.errors import OptionsError, TargetError
from fhe_fx.evaluate import (
    STAGES,
    DataError,
    Evaluation,
    Texts,
    compare,
    evaluate_submodule,
    sample_texts,
)
from fhe_fx.evaluate import run as module
from fhe_fx.passes import default_pipeline
from fhe_fx.passes.lower_to_integers import LowerToIntegers
from tests.evaluate.conftest import TOKENS
from tests.models import shipped_gpt2, shipped_sentences, tiny_gpt2


def _tiny(**changes: Any) -> Evaluation:
    given: dict[str, Any] = {
        "n_bits": 4, "tokens": 4, "sentences": 6, "stages": ["clear"], **changes
    }  # fmt: skip
    return evaluate_submodule(tiny_gpt2(), "h.0.mlp", **given)


def test_every_stage_is_measured(evaluation: Evaluation) -> None:
    assert [s.n_bits for s in evaluation.settings] == [2, 6]
    assert evaluation.positions == sum(TOKENS - (i % 3 == 0) for i in range(24))
    for setting in evaluation.settings:
        assert [s.stage for s in setting.stages] == list(STAGES)
        for stage in setting.stages:
            top = stage.metrics["top1"]
            assert top.low is not None
            assert top.high is not None
            assert 0 <= top.low <= top.value <= top.high <= 1
    assert evaluation.float_stage.metrics["relative_error"].value == 0.0


def test_more_bits_are_nearer_to_float(evaluation: Evaluation) -> None:
    few, many = evaluation.settings
    for stage in STAGES:
        error = [s.stage(stage).metrics["relative_error"] for s in (few, many)]
        assert error[1].high is not None
        assert error[0].low is not None
        assert error[1].high < error[0].low
        kl = [s.stage(stage).metrics["kl"].value for s in (few, many)]
        assert kl[1] < kl[0]


def test_noise_adds_to_the_error(evaluation: Evaluation) -> None:
    """At few bits; at many, what is read several times rounds otherwise each time, which helps."""
    few, _ = evaluation.settings
    clear, simulated = (
        few.stage(s).metrics["relative_error"].value for s in ("clear", "simulated")
    )
    assert simulated > clear


def test_clear_figures_are_those_of_the_encrypted_model_run_sentence_by_sentence(
    evaluation: Evaluation, held_out: Texts, cache: Path
) -> None:
    texts = sample_texts(shipped_gpt2(1), 128, 4 * TOKENS, seed=0)
    encrypted = fhe_fx.encrypt_submodule(
        shipped_gpt2(1),
        "h.0.attn",
        n_bits=6,
        max_tokens=TOKENS,
        heads=[0],
        calibration=[{"input_ids": row[None]} for row in texts],
    )
    fhe_fx.set_mode(encrypted, "clear")
    agree = loss = count = 0.0
    with torch.no_grad():
        for row in held_out.rows:
            ours = encrypted(row[None]).logits[0]
            theirs = shipped_gpt2(1)(row[None]).logits[0]
            agree += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            loss -= float(ours.log_softmax(-1)[:-1].gather(-1, row[1:, None]).sum())
            count += len(row) - 1
    found = evaluation.settings[1].stage("clear").metrics
    assert found["top1"].value == pytest.approx(agree / evaluation.positions)
    assert found["perplexity"].value == pytest.approx(float(torch.tensor(loss / count).exp()))


def test_the_model_is_left_as_it_was(cache: Path) -> None:
    model = tiny_gpt2()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    evaluate_submodule(model, "h.0.mlp", tokens=4, sentences=3, stages=["clear"])
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.transformer.h[0].mlp).__name__ == "GPT2MLP"


def test_several_submodules_at_once(cache: Path) -> None:
    found = evaluate_submodule(
        tiny_gpt2(), "h.*.mlp", n_bits=6, tokens=3, sentences=4, stages=["clear", "simulated"]
    )
    assert found.targets == ("transformer.h.0.mlp", "transformer.h.1.mlp")
    one = evaluate_submodule(
        tiny_gpt2(), "h.0.mlp", n_bits=6, tokens=3, sentences=4, stages=["clear"]
    )
    assert found.settings[0].look_ups > one.settings[0].look_ups


def test_a_model_is_evaluated_as_a_whole(cache: Path) -> None:
    """As it is encrypted as a whole: the same figures as sentence by sentence, short ones too."""
    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_inner": 8, "vocab_size": 16}
    model = tiny_gpt2(**sizes)
    rows = [(a + b * torch.arange(2 + a % 2)) % 16 for a in range(16) for b in (3, 7)]
    calibration = [(a + b * torch.arange(3))[None] % 16 for a in range(16) for b in (5, 11)]
    found = evaluate_submodule(
        model,
        "",
        tokens=3,
        data=Texts(tuple(rows), "sequences"),
        calibration=calibration,
        stages=["clear"],
    )
    encrypted = fhe_fx.encrypt_submodule(model, "", max_tokens=3, calibration=calibration)
    fhe_fx.set_mode(encrypted, "clear")
    with torch.no_grad():
        pairs = [[m(input_ids=row[None]).logits for m in (encrypted, model)] for row in rows]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    (setting,) = found.settings
    measured = setting.stage("clear").metrics
    assert measured["relative_error"].value == pytest.approx((error / size) ** 0.5, rel=1e-4)
    same = [bool(x) for a, b in pairs for x in (a.argmax(-1) == b.argmax(-1)).flatten()]
    assert measured["top1"].value == pytest.approx(sum(same) / len(same))
    assert setting.look_ups == fhe_fx.report(encrypted).regions[0].look_ups
    assert found.targets == ("",)
    assert found.table().startswith("GPT2LMHeadModel as a whole, 3 tokens\n")


def test_an_interrupted_evaluation_goes_on(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = fhe_fx.encrypt_submodule
    lowered: list[int] = []

    def stop_at_4(*args: Any, options: Options, **kwargs: Any) -> Any:
        if options.n_bits == 4 and not lowered.count(4):
            lowered.append(4)
            raise KeyboardInterrupt
        lowered.append(options.n_bits)
        return lower(*args, options=options, **kwargs)

    monkeypatch.setattr(module, "encrypt_submodule", stop_at_4)
    with pytest.raises(KeyboardInterrupt):
        _tiny(n_bits=(2, 4), out=tmp_path)
    resumed = _tiny(n_bits=(2, 4), out=tmp_path)
    assert lowered == [2, 4, 4]
    again = _tiny(n_bits=(2, 4), out=tmp_path)
    assert lowered == [2, 4, 4]
    assert again.settings == resumed.settings
    # Another noise, another text, a file that is cut: measured anew.
    _tiny(n_bits=2, out=tmp_path, options=Options(p_error=0.2))
    _tiny(n_bits=2, out=tmp_path, sentences=5)
    for path in (tmp_path / "settings").glob("*.json"):
        path.write_text(path.read_text()[:100])
    _tiny(n_bits=2, out=tmp_path)
    assert lowered == [2, 4, 4, 2, 2, 2]


def test_files_hold_what_was_found(tmp_path: Path, evaluation: Evaluation) -> None:
    paths = evaluation.write(tmp_path)
    assert [p.name for p in paths] == ["evaluation.json", "evaluation.csv"]
    held = json.loads(paths[0].read_text())
    top = held["settings"][1]["stages"][1]["metrics"]["top1"]["value"]
    assert top == evaluation.settings[1].stage("clear").metrics["top1"].value
    lines = paths[1].read_text().splitlines()
    assert len(lines) == 1 + 2 * 4
    assert lines[0].startswith("n_bits,stage,top1,top1_low,top1_high,top5,")


# Warnings -------------------------------------------------------------------------------------


def test_calibrating_on_the_sentences_is_said(cache: Path) -> None:
    rows = [r[0, :4] for r in shipped_sentences()[:12]]
    found = evaluate_submodule(
        shipped_gpt2(1), "h.0.attn", tokens=4, heads=[0], stages=["clear"],
        data=Texts(tuple(rows), "held-out sentences"),
        calibration=[{"input_ids": row} for row in shipped_sentences()[3:40]],
    )  # fmt: skip
    (warning,) = found.warnings
    assert warning == (
        "75% of the sentences stand in the calibration texts, so ranges were made for them. "
        "Use other texts for one of the two."
    )


def test_random_calibration_is_said(cache: Path) -> None:
    ids = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:160].view(40, 4)
    found = evaluate_submodule(
        shipped_gpt2(1), "h.0.attn", tokens=4, heads=[0], stages=["clear"], sentences=6,
        calibration=[{"input_ids": row[None]} for row in ids],
    )  # fmt: skip
    assert any("look like random noise" in text for text in found.settings[0].warnings)


def test_ranges_that_do_not_fit_are_said(cache: Path) -> None:
    same = [{"input_ids": torch.full((1, 4), 7)}, {"input_ids": torch.tensor([[7, 7, 8, 7]])}] * 2
    found = evaluate_submodule(
        shipped_gpt2(1), "h.0.attn", tokens=4, heads=[0], stages=["clear"], sentences=12,
        calibration=same,
    )  # fmt: skip
    (warning,) = (w for w in found.settings[0].warnings if "outside" in w)
    assert "had more than 0.1% of their values outside the calibrated range" in warning
    assert found.settings[0].ranges[0]["share"] > 0.001


def test_noise_beyond_the_model_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("noise explains" in w for w in _tiny(stages=["simulated"]).settings[0].warnings)
    allowed = module.EXCESS
    monkeypatch.setattr(module, "EXCESS", 0.5)
    (warning,) = (
        w for w in _tiny(stages=["simulated"]).settings[0].warnings if "noise explains" in w
    )
    said = re.match(r"transformer\.h\.0\.mlp: simulated results are (\d\.\d) times", warning)
    assert said is not None
    assert 0.5 <= float(said[1]) <= allowed


# Refusals -------------------------------------------------------------------------------------


def test_a_pipeline_without_a_stage_goes_without_it(cache: Path) -> None:
    @dataclass(frozen=True)
    class Renamed(LowerToIntegers):
        name: ClassVar[str] = "another-lowering"

    pipeline = default_pipeline().replace("lower-to-integers", Renamed())
    (setting,) = _tiny(stages=["fake_quantized", "clear"], passes=pipeline).settings
    assert [s.stage for s in setting.stages] == ["clear"]
    assert any(
        w.startswith("There is no stage fake_quantized: No pass 'lower-to-integers'")
        for w in setting.warnings
    )


def test_bad_input_is_refused(cache: Path) -> None:
    with pytest.raises(OptionsError) as caught:
        _tiny(stages=["simulate"])
    assert str(caught.value) == (
        "There is no stage 'simulate'; there are fake_quantized, clear, simulated. "
        "Did you mean 'simulated'?"
    )
    for name in ("tokens", "sentences"):
        with pytest.raises(OptionsError, match=f"{name}=0 is not a positive integer"):
            _tiny(**{name: 0})
    with pytest.raises(OptionsError, match="at least one n_bits and one stage"):
        _tiny(n_bits=())
    with pytest.raises(TargetError, match="has no submodule"):
        evaluate_submodule(tiny_gpt2(), "h.9.attn")
    with pytest.raises(DataError, match="A sentence has 5 tokens; the circuit takes 4"):
        _tiny(data=Texts((torch.arange(5),), "a test"))
    with pytest.raises(DataError, match="There are no sentences to evaluate on"):
        _tiny(data=Texts((), "a test"))
    with pytest.raises(DataError, match="GPT2Model returns no logits of next tokens"):
        evaluate_submodule(tiny_gpt2(is_base=True), "h.0.attn", tokens=4, sentences=2)


def test_more_predictions_than_memory_holds_are_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_MAX_BYTES", 40 * 4 * 10)
    with pytest.raises(DataError, match="Give fewer sentences, 10 tokens at most"):
        _tiny()

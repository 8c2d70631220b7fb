"""Metrics on predictions whose figures are known, and intervals that hold what they should."""

from __future__ import annotations

import math

import pytest
import torch

from fhe_fx.evaluate import Estimate
from fhe_fx.evaluate.metrics import Tally, position_sums


def _tally(expected: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> Tally:
    tally = Tally()
    position_sums(tally, expected, logits, ids)
    return tally


def _random(n: int = 6, tokens: int = 5, words: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn((n, tokens, words), generator=generator)
    return logits, torch.randint(words, (n, tokens), generator=generator)


def test_a_model_agrees_with_itself_also_where_words_are_equally_likely() -> None:
    logits, ids = _random()
    for same in (logits, torch.zeros_like(logits), logits.round()):
        found = _tally(same, same, ids).estimates()
        assert found["top1"] == Estimate(1.0, 1.0, 1.0)
        assert found["kl"].value == 0.0


def test_top_k_counts_where_the_float_models_word_stands() -> None:
    logits, ids = _random()
    best = logits.argmax(-1, keepdim=True)
    words = torch.arange(30)
    for place in (0, 3, 7, 12):  # the float model's word stands behind `place` others
        rank = (words - (words > best).long()).float()
        other = torch.where(words == best, torch.tensor(0.5 - place), -rank)
        found = _tally(logits, other, ids).estimates()
        for k in (1, 5, 10):
            assert found[f"top{k}"].value == float(place < k), (place, k)


def test_perplexity_is_that_of_the_next_words() -> None:
    logits, ids = _random()
    steps = logits.log_softmax(-1)
    losses = [-steps[i, t, ids[i, t + 1]] for i in range(6) for t in range(4)]
    expected = math.exp(float(torch.stack(losses).mean()))
    assert _tally(logits, logits, ids).estimates()["perplexity"].value == pytest.approx(expected)


def test_kl_is_torchs() -> None:
    logits, ids = _random()
    other = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum"
    )
    found = _tally(logits, other, ids).estimates()["kl"].value
    assert found == pytest.approx(float(expected) / ids.numel(), rel=1e-5)


def test_sentences_of_one_word_have_no_perplexity() -> None:
    logits, ids = _random(tokens=1)
    found = _tally(logits, logits, ids).estimates()
    assert "perplexity" not in found
    assert found["top1"].value == 1.0


def test_one_sentence_has_no_interval() -> None:
    logits, ids = _random(n=1)
    top = _tally(logits, logits, ids).estimates()["top1"]
    assert (top.low, top.high) == (None, None)
    assert str(top) == "1"


def test_intervals_hold_the_true_value_as_often_as_they_say() -> None:
    """Of 200 experiments, 95 % should; a percentile interval of 40 sentences holds a little less.

    At a coverage of 0.92, fewer than 170 of 200 would be seen once in 20,000 runs.
    """
    truth, held = 0.8, 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        # Positions of a sentence agree together: what resampling positions would get wrong.
        easy = torch.rand((40, 1), generator=generator) < 0.6
        chance = torch.where(easy, 1.0, 0.5)  # 0.6 + 0.4 * 0.5 = 0.8
        hits = torch.rand((40, 6), generator=generator) < chance
        tally = Tally()
        tally.add("top1", hits.sum(1), torch.full((40,), 6))
        top = tally.estimates()["top1"]
        assert top.low is not None
        assert top.high is not None
        held += top.low <= truth <= top.high
    assert 170 <= held < 200


def test_sentences_weigh_by_their_positions() -> None:
    tally = Tally()
    tally.add("top1", torch.tensor([1]), torch.tensor([1]))
    tally.add("top1", torch.tensor([0]), torch.tensor([3]))
    assert tally.estimates()["top1"].value == 0.25

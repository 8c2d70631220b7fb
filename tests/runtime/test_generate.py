"""Writing token by token: what is chosen, which circuit runs, and what is refused before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fhe_fx
from fhe_fx.errors import InputError, OptionsError
from fhe_fx.runtime.generate import Sampling, lengths_for, plan_generation, rows_read
from tests.models import FEW, Mlp, shipped_gpt2, tiny_gpt2

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.3, 1.9])


@pytest.fixture(scope="module")
def writer() -> Any:
    """Not to be changed but for its mode."""
    return fhe_fx.encrypt_submodule(
        tiny_gpt2(), "h.0.attn", n_bits=5, max_tokens=(2, 4), options=FEW
    )


def _numbers(model: Any, *args: Any, **kwargs: Any) -> list[int]:
    return [token.id for token in fhe_fx.generate(model, *args, stop=(), **kwargs)]


@pytest.mark.parametrize("mode", ["disable", "clear"])
def test_the_most_likely_tokens_are_those_of_transformers(writer: Any, mode: str) -> None:
    fhe_fx.set_mode(writer, mode)
    prompt = torch.tensor([[3, 7]])
    theirs = writer.generate(
        prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert _numbers(writer, prompt, max_new_tokens=3) == theirs[0, 2:].tolist()


@pytest.mark.parametrize(("temperature", "top_k"), [(0.7, 0), (1.5, 3), (1.0, 1), (1.0, 99)])
def test_tokens_are_drawn_as_transformers_draws_them(temperature: float, top_k: int) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper

    ids, scores = torch.zeros(1, 1, dtype=torch.int64), LOGITS[None]
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    theirs: Tensor = TemperatureLogitsWarper(temperature)(ids, scores).softmax(-1)[0]
    ours = Sampling(temperature, top_k).probabilities(LOGITS)
    torch.testing.assert_close(ours, theirs)


def test_the_seed_decides(writer: Any) -> None:
    fhe_fx.set_mode(writer, "clear")

    def write(seed: int) -> list[int]:
        return _numbers(writer, [3], max_new_tokens=4, temperature=2.0, seed=seed)

    assert write(1) == write(1)
    assert len({tuple(write(seed)) for seed in range(4)}) > 1


def test_each_token_takes_the_shortest_circuit(writer: Any) -> None:
    fhe_fx.set_mode(writer, "clear")
    plan = plan_generation(writer, 1, 4)
    assert (plan.rows, plan.circuits) == ((1, 2, 3, 4), (2, 2, 4, 4))
    assert plan.slides_from is None
    assert plan.complexity is None  # nothing is compiled
    assert str(plan) == "4 new tokens: 2 runs of 2 tokens, 2 runs of 4 tokens"
    tokens = list(fhe_fx.generate(writer, [3], max_new_tokens=4, stop=()))
    assert [(t.rows, t.circuit) for t in tokens] == [(1, 2), (2, 2), (3, 4), (4, 4)]


def test_a_window_slides_by_choice(writer: Any) -> None:
    fhe_fx.set_mode(writer, "clear")
    plan = plan_generation(writer, 3, 4, "slide")
    assert (plan.rows, plan.slides_from) == ((3, 4, 4, 4), 2)
    assert str(plan) == (
        "4 new tokens: 4 runs of 4 tokens; from new token 3 on the model reads the last 4 only"
    )
    long = _numbers(writer, [5, 3, 7], max_new_tokens=4, outgrown="slide")
    text = [5, 3, 7, *long]
    for k in range(4):  # each token depends on the last four alone
        window = text[max(0, k - 1) : k + 3]
        assert _numbers(writer, window, max_new_tokens=1) == [long[k]]


def test_a_text_that_outgrows_the_circuits_is_refused_before_it_starts(writer: Any) -> None:
    fhe_fx.set_mode(writer, "clear")
    with pytest.raises(InputError) as caught:
        fhe_fx.generate(writer, [3, 7], max_new_tokens=4)
    assert str(caught.value) == (
        "A prompt of 2 tokens and 4 new ones make a model read 5 tokens; the longest circuit takes "
        "4. Ask for 3 new ones at most, add 5 to the lengths (max_tokens, --tokens), or let a "
        "window of 4 tokens slide (outgrown, --outgrown slide)."
    )
    with pytest.raises(InputError, match=r"takes 4\. Shorten it, add 6 to the lengths"):
        fhe_fx.generate(writer, [3] * 6, max_new_tokens=1)
    fhe_fx.set_mode(writer, "disable")  # the model's own positions are the limit then
    assert len(_numbers(writer, [3, 7], max_new_tokens=5)) == 5
    with pytest.raises(InputError, match=r"reads? 17 tokens; the longest circuit takes 16"):
        fhe_fx.generate(writer, [3, 7], max_new_tokens=16)


def test_it_ends_where_the_model_does() -> None:
    model = shipped_gpt2()
    ids = torch.tensor([[11, 12, 13]])
    first = next(fhe_fx.generate(model, ids, max_new_tokens=1)).id
    ended = list(fhe_fx.generate(model, ids, max_new_tokens=9, stop=[first]))
    assert [t.id for t in ended] == [first]
    assert ended[0].circuit is None


def test_the_ladder_is_as_long_as_the_text_needs() -> None:
    assert lengths_for(4, 1) == (4,)
    assert lengths_for(3, 1) == (3,)
    assert lengths_for(4, 5) == (4, 8)
    assert lengths_for(3, 8) == (4, 8, 10)
    assert lengths_for(6, 9) == (8, 14)
    assert lengths_for(2, 99) == (4, 8, 16)
    assert lengths_for(30, 2) == (16,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is not a number from 0 on"),
        ({"temperature": float("nan")}, "temperature=nan is not a number from 0 on"),
        ({"top_k": -2, "temperature": 1.0}, "top_k=-2 is not a number of tokens"),
        ({"top_k": 3}, "top_k=3 has no effect at temperature 0"),
        ({"seed": -1}, "seed=-1 is not an integer in"),
    ],
)
def test_refuses_absurd_choices(writer: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError) as caught:
        fhe_fx.generate(writer, [3], max_new_tokens=1, **given)
    assert str(caught.value).startswith(message)


def test_refuses_what_is_no_text(writer: Any) -> None:
    fhe_fx.set_mode(writer, "clear")
    with pytest.raises(InputError, match=r"The prompt has shape \[2, 2\] and type torch.int64"):
        fhe_fx.generate(writer, torch.zeros(2, 2, dtype=torch.int64), max_new_tokens=1)
    with pytest.raises(InputError, match=r"shape \[2\] and type torch.float32"):
        fhe_fx.generate(writer, torch.zeros(2), max_new_tokens=1)
    with pytest.raises(InputError, match=r"The prompt has no token\. Give at least one word\."):
        fhe_fx.generate(writer, [], max_new_tokens=1)
    with pytest.raises(OptionsError, match="max_new_tokens=0 is not a positive integer"):
        fhe_fx.generate(writer, [3], max_new_tokens=0)
    with pytest.raises(OptionsError, match=r"outgrown='slid' is not one of error, slide\. Did you"):
        rows_read(1, 1, 4, "slid")


def test_refuses_what_does_not_write() -> None:
    base = tiny_gpt2(is_base=True)
    with pytest.raises(InputError, match="GPT2Model returns no logits of next tokens"):
        next(fhe_fx.generate(base, [3], max_new_tokens=1))
    with pytest.raises(InputError) as caught:
        fhe_fx.generate(Mlp(), [3], max_new_tokens=1)
    assert str(caught.value) == "Mlp takes no input_ids, so it cannot write."


@pytest.mark.fhe
def test_a_token_is_written_under_encryption() -> None:
    model = fhe_fx.encrypt_submodule(
        tiny_gpt2(), "h.0.attn", heads=[0], n_bits=2, max_tokens=2, options=FEW
    )
    fhe_fx.compile(model, verbose=False)
    fhe_fx.set_mode(model, "execute")
    plan = plan_generation(model, 2, 1)
    facts = fhe_fx.report(model).regions[0]
    assert plan.complexity == facts.complexity
    (token,) = fhe_fx.generate(model, [3, 7], max_new_tokens=1)
    assert 0 <= token.id < 40
    assert (token.rows, token.circuit) == (2, 2)

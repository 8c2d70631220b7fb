"""Calibration inputs: read, checked, warned of, or sampled from the model itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fhe_fx import Options
from fhe_fx.errors import CalibrationError
from fhe_fx.quant.calibration import Call, as_call, check_calibration, sample_from_model
from tests.models import Mlp, tiny_gpt2

ONE, TWO = torch.ones(2), torch.arange(3)


# Reading ----------------------------------------------------------------------------------------


def test_what_reads_as_a_call() -> None:
    assert as_call(ONE) == Call((ONE,), {})
    assert as_call((ONE, TWO)) == Call((ONE, TWO), {})
    assert as_call([ONE, TWO]) == Call((ONE, TWO), {})
    assert as_call({"ids": TWO, "cache": False}) == Call((), {"ids": TWO, "cache": False})
    call = Call((ONE,), {"mask": TWO, "cache": False})
    assert as_call(call) is call
    assert [id(t) for t in call.tensors()] == [id(ONE), id(TWO)]


def test_a_call_keeps_its_own_keyword_arguments() -> None:
    given = {"ids": TWO}
    call = as_call(given)
    given.clear()
    assert list(call.kwargs) == ["ids"]


@pytest.mark.parametrize(
    ("given", "kind"), [("a sentence", "str"), (np.ones(2), "ndarray"), ((ONE, 3), "tuple")]
)
def test_refuses_what_is_no_call(given: Any, kind: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        as_call(given)
    assert str(caught.value) == (
        f"A model input is a {kind}; give a tensor, a tuple of tensors, or a mapping of keyword "
        f"arguments (as a tokenizer returns)."
    )


# Checking ---------------------------------------------------------------------------------------


def test_inputs_are_read_in_order_from_any_iterable() -> None:
    given = [ONE, {"ids": TWO}]
    assert check_calibration(iter(given)) == [as_call(one) for one in given]
    assert check_calibration(ONE) == [as_call(ONE)]  # one batch, not its two rows
    assert check_calibration({"ids": TWO}) == [as_call({"ids": TWO})]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "calibration is empty. Give some inputs, or leave it out."),
        (3, "calibration is a int; give a list of model inputs."),
        ("some text", "calibration is a str; give a list of model inputs."),
        ([ONE, ONE / 0], "Calibration input 1 holds nan or inf."),
        ([{"ids": TWO, "x": ONE * torch.nan}], "Calibration input 0 holds nan or inf."),
    ],
)
def test_refuses_inputs_that_cannot_calibrate(given: Any, sentence: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        check_calibration(given)
    assert str(caught.value) == sentence


# Noise ------------------------------------------------------------------------------------------


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def tokens(size: int, n: int) -> Tensor:
    return torch.randint(size, (n,), generator=torch.Generator().manual_seed(0))


def zipf(n: int) -> Tensor:
    """Return token numbers as frequent as words are: the k-th in proportion to 1/k."""
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(1.0 / torch.arange(1, 5001), n, True, generator=generator)


NORMAL, UNIFORM = "standard normal values", "values uniform on [0, 1]"
TOKENS = "token numbers without repetition"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        pytest.param([normal(16, 16)], NORMAL, id="normal"),
        pytest.param([*normal(64, 4)], NORMAL, id="normal, in parts"),
        pytest.param([normal(16, 16).half()], NORMAL, id="normal, in half precision"),
        pytest.param([{"cache": False, "x": normal(256)}], NORMAL, id="normal, by keyword"),
        pytest.param([normal(255)], "", id="normal, too few to say"),
        pytest.param([normal(16, 16) + 0.5], "", id="normal, off centre"),
        pytest.param([normal(16, 16) * 1.5], "", id="normal, of another size"),
        pytest.param([normal(4096) * normal(2, 4096)[1]], "", id="heavy-tailed, of size one"),
        pytest.param([uniform(16, 16)], UNIFORM, id="uniform"),
        pytest.param([uniform(16, 16) * 2 - 1], "", id="uniform, with a sign"),
        pytest.param([uniform(16, 16) * 1.5], "", id="uniform, beyond one"),
        pytest.param([uniform(16, 16) ** 4], "", id="dark, as most pictures are"),
        pytest.param([torch.full((256,), 0.5)], "", id="constant"),
        pytest.param([tokens(5000, 64)], TOKENS, id="tokens"),
        pytest.param([*tokens(5000, 128).view(8, 16)], TOKENS, id="tokens, in parts"),
        pytest.param([tokens(5000, 63)], "", id="tokens, too few to say"),
        pytest.param([tokens(64, 512)], "", id="classes, or bytes"),
        pytest.param([zipf(256)], "", id="words"),
        pytest.param([{"cache": False}], "", id="no tensor"),
        pytest.param([ONE], "", id="two numbers"),
    ],
)
def test_noise_is_told_from_data(given: list[Any], reason: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls = check_calibration(given)
    assert len(calls) == len(given)
    sentence = (
        f"The calibration data look like random noise ({reason}). Ranges found on noise do not fit "
        f"real inputs. Give real inputs, or leave calibration out: the model then samples its own."
    )
    assert [str(w.message) for w in caught] == ([sentence] if reason else [])


# Sampling ---------------------------------------------------------------------------------------


class Counts(nn.Module):
    """A language model that counts: after token k comes k + 1, nearly surely."""

    def __init__(self, result: str = "logits", **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=32, **config)
        self.table: nn.Embedding = nn.Embedding.from_pretrained(torch.eye(32))
        self.result = result
        self.longest = 0

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.longest = max(self.longest, input_ids.shape[1])
        return SimpleNamespace(**{self.result: 100 * self.table((input_ids + 1) % 32)})


def rows(calls: list[Call]) -> list[list[int]]:
    assert all(list(c.kwargs) == ["input_ids"] and not c.args for c in calls)
    return [c.kwargs["input_ids"].squeeze(0).tolist() for c in calls]


@pytest.mark.parametrize("result", ["logits", "last_hidden_state"])
def test_samples_are_halves_of_longer_ones_without_their_start(result: str) -> None:
    model = Counts(result, bos_token_id=7)
    calls = sample_from_model(model, 4, Options(n_samples=6))
    assert rows(calls) == [[8, 9, 10, 11]] * 3 + [[12, 13, 14, 15]] * 3


def test_halves_overlap_where_the_model_has_no_room() -> None:
    model = Counts(bos_token_id=0, max_position_embeddings=7)
    assert rows(sample_from_model(model, 4, Options(n_samples=2))) == [[1, 2, 3, 4], [3, 4, 5, 6]]
    assert model.longest < 7


@pytest.mark.parametrize("n_samples", [2, 5, 8])
@pytest.mark.parametrize("n_tokens", [1, 5, 12, 16])
def test_as_many_samples_as_asked_each_its_own(n_tokens: int, n_samples: int) -> None:
    calls = sample_from_model(tiny_gpt2(), n_tokens, Options(n_samples=n_samples))
    found = [call.kwargs["input_ids"] for call in calls]
    assert [(ids.shape, ids.dtype) for ids in found] == [((1, n_tokens), torch.int64)] * n_samples
    assert all(0 <= int(ids.min()) <= int(ids.max()) < 40 for ids in found)
    if n_tokens > 4:  # shorter ones may well be alike
        assert len({tuple(row) for row in rows(calls)}) == n_samples


@pytest.mark.parametrize("start", [None, 99])
def test_without_a_start_token_the_first_is_drawn(start: int | None) -> None:
    calls = sample_from_model(Counts(bos_token_id=start), 3, Options(n_samples=32))
    found = rows(calls)
    assert all(row == [(row[0] + i) % 32 for i in range(3)] for row in found)
    assert len({row[0] for row in found}) > 8


def test_without_logits_tokens_are_drawn_evenly() -> None:
    model = Counts("pooled", bos_token_id=0)
    found = torch.tensor(rows(sample_from_model(model, 20, Options(n_samples=128))))
    counts = torch.bincount(found.reshape(-1), minlength=32).double()
    expected = found.numel() / 32
    # Chi-squared of 31 degrees of freedom: above 75 with probability 2e-5, on this one seed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 75


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: Counts("pooled")], ids=["logits", "none"])
def test_the_seed_decides_and_nothing_else_is_touched(make: Callable[[], Any]) -> None:
    model = make()
    state = torch.get_rng_state()
    first, again, other = (
        rows(sample_from_model(model, 5, Options(n_samples=4, seed=seed))) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


def sampling_refusal(model: nn.Module, n_tokens: int) -> str:
    with pytest.raises(CalibrationError) as caught:
        sample_from_model(model, n_tokens, Options(n_samples=2))
    return str(caught.value)


def test_refuses_to_sample_from_a_model_without_a_vocabulary() -> None:
    assert sampling_refusal(Mlp(), 4) == (
        "Mlp has no vocabulary to sample inputs from. "
        "Pass calibration=[...]: some dozens of real inputs."
    )


def test_refuses_more_tokens_than_the_model_takes() -> None:
    assert sampling_refusal(tiny_gpt2(), 17) == (
        "GPT2LMHeadModel cannot sample its own calibration inputs: it fails on 17 tokens "
        "(IndexError: index out of range in self). Pass calibration=[...], or a smaller max_tokens."
    )


def test_refuses_weights_that_are_not_finite() -> None:
    model = Counts(bos_token_id=0)
    model.table.weight.data[3] = torch.inf  # read after token 2, at the third step
    assert sampling_refusal(model, 4) == (
        "Counts returns nan or inf on 3 tokens of its own. Load its weights again."
    )

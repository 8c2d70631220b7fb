"""Logits of the next token: a text is read once where a model keeps what it has read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fhe_fx.quant.next_token import NextToken
from tests.models import tiny_gpt2


class Remembers(nn.Module):
    """Expects the sum of a text's tokens so far, and keeps that sum."""

    def __init__(self, name: str = "cache", fault: str = "") -> None:
        super().__init__()
        self.name, self.fault = name, fault
        self.read: list[int] = []
        if name == "past_key_values":
            self.forward = self.forward_older  # type: ignore[method-assign,assignment]

    def forward_older(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False
    ) -> SimpleNamespace:
        return self._answer(input_ids, past_key_values, use_cache)

    def forward(
        self, input_ids: Tensor, cache: Any = None, use_cache: bool = False
    ) -> SimpleNamespace:
        return self._answer(input_ids, cache, use_cache)

    def _answer(self, ids: Tensor, kept: Any, use_cache: bool) -> SimpleNamespace:
        self.read.append(ids.shape[1])
        if kept is not None and self.fault == "fails":
            raise ValueError("it cannot go on")
        before = 0 if kept is None or self.fault == "forgets" else kept
        total = before + ids.sum(1)
        logits = nn.functional.one_hot(total % 32, 32).float()[:, None].expand(-1, ids.shape[1], -1)
        keeps = use_cache and self.fault != "keeps nothing"
        return SimpleNamespace(logits=logits, **{self.name: total if keeps else None})


def _greedy(model: nn.Module, steps: int) -> Tensor:
    ids, reader = torch.tensor([[1], [5]]), NextToken(model)
    for _ in range(steps):
        logits = reader.logits(ids)
        assert logits is not None
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_every_token_is_read_once_but_for_one_check(name: str) -> None:
    model = Remembers(name)
    assert _greedy(model, 5).tolist() == [[1, 1, 2, 4, 8, 16], [5, 5, 10, 20, 8, 16]]
    assert model.read == [1, 1, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("fault", "read"),
    [
        ("forgets", [1, 1, 2, 2, 3, 4, 5]),  # some texts to see it, then all
        ("fails", [1, 1, 2, 3, 4, 5]),
        ("keeps nothing", [1, 2, 3, 4, 5]),
    ],
)
def test_where_keeping_does_not_work_all_is_read_again(fault: str, read: list[int]) -> None:
    model = Remembers(fault=fault)
    assert _greedy(model, 5).tolist() == [[1, 1, 2, 4, 8, 16], [5, 5, 10, 20, 8, 16]]
    assert model.read == read


def test_the_check_reads_some_texts_again() -> None:
    model, ids = tiny_gpt2(), torch.arange(40).view(20, 2)
    texts: list[int] = []
    model.transformer.wte.register_forward_pre_hook(lambda _, args: texts.append(len(args[0])))
    reader = NextToken(model)
    with torch.no_grad():
        found = [reader.logits(ids[:, :n]) for n in (1, 2)]
        assert texts == [20, 20, 8]
        whole = model(input_ids=ids).logits
    torch.testing.assert_close(torch.stack(found, 1), whole)  # type: ignore[arg-type]


def test_a_transformer_reads_one_token_at_a_time_and_answers_for_the_last_alone() -> None:
    model = tiny_gpt2()
    read: list[int] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    lengths: list[int] = []
    model.transformer.wte.register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    ids = torch.arange(24).view(2, 12)
    reader = NextToken(model)
    with torch.no_grad():
        found = [reader.logits(ids[:, :n]) for n in range(1, 13)]
        assert lengths == [1, 1, 2, *[1] * 10]
        assert set(read) == {1}
        hook.remove()
        whole = model(input_ids=ids).logits
    torch.testing.assert_close(torch.stack(found, 1), whole)  # type: ignore[arg-type]

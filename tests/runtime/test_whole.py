"""All of a model encrypted: what stays with the client, how it is called, how near it is."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.errors import ArtifactError, CaptureError, TargetError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.program import Program
from fhe_fx.options import Options
from fhe_fx.passes.partition import ENCRYPTED, PREFIX
from fhe_fx.runtime.generate import generate
from fhe_fx.runtime.standin import put
from fhe_fx.runtime.whole import Whole
from tests.models import FEW, tiny_gpt2

LENGTHS = (2, 3)


def _small() -> Any:
    """Return a whole language model whose head has weights of its own."""
    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_inner": 8, "vocab_size": 16}
    return tiny_gpt2(tie_word_embeddings=False, **sizes)


@pytest.fixture(scope="module")
def whole() -> Any:
    """Not to be changed but for its mode.

    Calibrated on every token at every place: on few samples, errors are those of values that leave
    their range, which no number of bits makes smaller.
    """
    steps = torch.arange(LENGTHS[-1])
    texts = [((first + step * steps) % 16)[None] for first in range(16) for step in (5, 15)]
    return fhe_fx.encrypt_submodule(
        _small(),
        "",
        n_bits=8,
        p_error=0.1,
        max_tokens=LENGTHS,
        calibration=texts,
        options=Options(n_samples=len(texts)),
    )


def _ids(n: int) -> Tensor:
    return torch.arange(3, 3 + n)[None]


def _rounding(program: Program) -> float:
    """Return how much of a deviation the roundings between input and result make together.

    A look-up rounds what it reads to 2**-n_bits of its range, which is some six deviations: by
    6 / 2**n_bits / sqrt(12) of one. Those that stand in series add up.
    """
    depth: dict[fx.Node, int] = {}
    for node in program.encrypted():
        before = max((depth[n] for n in d.operands(node)), default=0)
        depth[node] = before + d.is_call(node, LOOKUP)
    one = 6 / float(2**program.options.n_bits) / 12**0.5
    return (1 + max(depth[n] for n in program.results)) * one


def test_the_client_embeds_and_the_server_does_the_rest(whole: Any) -> None:
    for part in encrypted_modules(whole):
        composed: Any = part.region.composed
        embeds = [n for n in composed.get_submodule(PREFIX).graph.nodes if n.op == "call_function"]
        assert sum(d.is_call(n, d.EMBED) for n in embeds) == 1
        assert not any(d.is_call(n, d.EMBED) for n in composed.get_submodule(ENCRYPTED).graph.nodes)
        inputs = [d.shape_of(n) for n in part.region.captured.placeholders]
        assert inputs == [(1, part.region.tokens, 8)]  # the sum of both embeddings
        assert [d.shape_of(n) for n in part.region.program.results] == [(1, part.region.tokens, 16)]


def test_it_is_called_as_the_model_is(whole: Any) -> None:
    model = _small()
    assert type(whole) is type(model)
    assert inspect.signature(whole.forward) == inspect.signature(model.forward)
    assert whole.state_dict().keys() == model.state_dict().keys()
    fhe_fx.set_mode(whole, "disable")
    assert torch.equal(whole(_ids(3)).logits, model(_ids(3)).logits)
    fhe_fx.set_mode(whole, "clear")
    assert torch.equal(whole(_ids(3)).logits, whole(input_ids=_ids(3)).logits)


def test_a_batch_is_one_sentence_after_the_other(whole: Any) -> None:
    fhe_fx.set_mode(whole, "clear")
    both = torch.cat([_ids(3), _ids(3) + 7])
    assert torch.equal(whole(both).logits[1:], whole(both[1:]).logits)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_clear_is_near_float_at_every_length(whole: Any, n: int) -> None:
    """A wrong weight or row gives an error of the results' size; eight bits leave a part of it."""
    model = _small()
    fhe_fx.set_mode(whole, "clear")
    with torch.no_grad():
        ours, exact = whole(_ids(n)).logits, model(_ids(n)).logits
    assert ours.shape == exact.shape
    part = whole.forward.stand_in.part_for((), {"input_ids": _ids(n)})
    assert float((ours - exact).norm() / exact.norm()) < _rounding(part.region.program)


def test_a_text_grows_on_its_ladder(whole: Any) -> None:
    fhe_fx.set_mode(whole, "clear")
    tokens = list(generate(whole, [3], max_new_tokens=3, stop=()))
    assert [(t.rows, t.circuit) for t in tokens] == [(1, 2), (2, 2), (3, 3)]


def test_a_copy_is_encrypted_and_has_its_own_mode(whole: Any) -> None:
    fhe_fx.set_mode(whole, "clear")
    twin = copy.deepcopy(whole)
    fhe_fx.set_mode(twin, "disable")
    assert {p.mode for p in encrypted_modules(whole)} == {"clear"}
    assert not torch.equal(twin(_ids(3)).logits, whole(_ids(3)).logits)


def test_what_replaces_the_model_in_its_holder_is_called() -> None:
    inner = nn.Linear(2, 2)
    holder = Whole(inner)
    put(holder, {inner: nn.Identity()})
    assert torch.equal(holder(torch.ones(1, 2)), torch.ones(1, 2))


def test_a_submodule_that_embeds_is_given_its_numbers() -> None:
    model = _small()
    encrypted = fhe_fx.encrypt_submodule(
        model, "transformer", n_bits=8, p_error=0.1, max_tokens=2, options=FEW
    )
    fhe_fx.set_mode(encrypted, "clear")
    with torch.no_grad():
        ours, exact = encrypted(_ids(2)).logits, model(_ids(2)).logits
    assert not torch.equal(ours, exact)
    (part,) = encrypted_modules(encrypted)
    assert float((ours - exact).norm() / exact.norm()) < _rounding(part.region.program)


def test_refuses_what_is_encrypted_already(whole: Any) -> None:
    for target in ("", "h.0.attn"):
        with pytest.raises(TargetError) as refused:
            fhe_fx.encrypt_submodule(whole, target, max_tokens=4, options=FEW)
        assert str(refused.value) == (
            "GPT2LMHeadModel cannot be encrypted: all of it is already. Start from the float model."
        )


def test_refuses_to_write_it_for_two(whole: Any, tmp_path: Any) -> None:
    with pytest.raises(ArtifactError) as refused:
        whole.save_pretrained(tmp_path / "model")
    assert str(refused.value) == (
        "All of this GPT2LMHeadModel is encrypted, and what remains with the client is no model. "
        "Encrypt the submodules behind the embedding to write it for two."
    )


class _Counts(nn.Module):
    """It computes with token numbers as with quantities."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.tanh(self.table(input_ids) * (input_ids > 3)[..., None])


def test_refuses_arithmetic_on_token_numbers() -> None:
    ids = [{"input_ids": _ids(4) + k} for k in range(8)]
    with pytest.raises(CaptureError, match="The region reads integers that depend on the model"):
        fhe_fx.encrypt_submodule(_Counts(), "", calibration=ids, options=FEW)

"""One submodule at several lengths: which circuit a call takes, and whose keys it uses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.errors import CalibrationError, CaptureError, InputError, OptionsError
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.views import Lookup
from fhe_fx.runtime.ladder import Ladder
from tests.models import FEW, tiny_bert, tiny_gpt2, token_inputs

LENGTHS = (2, 4)


@pytest.fixture(scope="module")
def ladder() -> Any:
    """Not to be changed but for its mode."""
    return fhe_fx.encrypt_submodule(
        tiny_gpt2(), "h.0.attn", heads=[0], n_bits=2, max_tokens=(4, 2), options=FEW
    )


def _alone(tokens: int) -> Any:
    """Return the model with one circuit, calibrated as the ladder's."""
    calls = [{"input_ids": ids} for ids in token_inputs(16, max(LENGTHS))]
    return fhe_fx.encrypt_submodule(
        tiny_gpt2(), "h.0.attn", n_bits=4, p_error=0.1, max_tokens=tokens, calibration=calls
    )


def _ids(n: int, batch: int = 1) -> Tensor:
    return torch.stack([torch.arange(3 + i, 3 + i + n) for i in range(batch)])


def test_circuits_that_share_keys_read_as_wide_look_ups(ladder: Any) -> None:
    programs = [part.region.program for part in encrypted_modules(ladder)]
    widest = [max(Lookup.of(n).bits for n in p.calls(LOOKUP)) for p in programs]
    assert len(programs) == 2
    assert len(set(widest)) == len({p.options.p_error for p in programs}) == 1


def test_the_shortest_circuit_that_fits_computes(ladder: Any) -> None:
    fhe_fx.set_mode(ladder, "clear")
    two, four = encrypted_modules(ladder)
    assert [two.region.tokens, four.region.tokens] == [2, 4]
    taken: list[int | None] = []
    for part in (two, four):
        part.register_forward_hook(lambda module, *rest: taken.append(module.region.tokens))
    for n in (1, 2, 3, 4):
        ladder(_ids(n))
    assert taken == [2, 2, 4, 4]


def test_a_ladder_computes_what_its_circuits_do() -> None:
    calls = [{"input_ids": ids} for ids in token_inputs(16, max(LENGTHS))]
    ladder = fhe_fx.encrypt_submodule(
        tiny_gpt2(), "h.0.attn", n_bits=4, p_error=0.1, max_tokens=LENGTHS, calibration=calls
    )
    fhe_fx.set_mode(ladder, "clear")
    for tokens in LENGTHS:
        alone = _alone(tokens)
        fhe_fx.set_mode(alone, "clear")
        ids = _ids(tokens, batch=2)
        with torch.no_grad():
            assert torch.equal(ladder(ids).logits, alone(ids).logits)


def test_a_text_beyond_the_longest_is_refused(ladder: Any) -> None:
    fhe_fx.set_mode(ladder, "clear")
    with pytest.raises(InputError) as caught:
        ladder(_ids(5))
    assert str(caught.value) == (
        "transformer.h.0.attn: args[0] has 5 rows in axis 1; the circuit was compiled for at most "
        "4. Give fewer, or encrypt again with max_tokens=5."
    )


def test_where_rows_depend_on_later_ones_only_equal_lengths_fit() -> None:
    calls = [{"input_ids": ids} for ids in token_inputs(16, 4)]
    model = fhe_fx.encrypt_submodule(
        tiny_bert(), "layer.0.attention", n_bits=3, max_tokens=(2, 4), calibration=calls
    )
    fhe_fx.set_mode(model, "clear")
    for n in (2, 4):
        model(_ids(n))
    with pytest.raises(InputError, match="3 rows were given to a circuit of 4, and a row of this"):
        model(_ids(3))


def test_it_stands_where_the_submodule_was(ladder: Any) -> None:
    part = ladder.transformer.h[0].attn
    assert isinstance(part, Ladder)
    assert list(ladder.state_dict()) == list(tiny_gpt2().state_dict())
    fhe_fx.set_mode(ladder, "disable")
    assert "encrypted at 2, 4 tokens, mode=disable" in repr(part)
    assert part.num_heads == 2  # an attribute of the original
    with torch.no_grad():
        assert torch.equal(ladder(_ids(7)).logits, tiny_gpt2()(_ids(7)).logits)


def test_modes_and_training_reach_every_circuit(ladder: Any) -> None:
    copied = copy.deepcopy(ladder)
    fhe_fx.set_mode(copied, "clear")
    assert [p.mode for p in encrypted_modules(copied)] == ["clear", "clear"]
    with pytest.raises(OptionsError, match="has no server"):
        fhe_fx.set_mode(copied, "remote")
    assert [p.mode for p in encrypted_modules(copied)] == ["clear", "clear"]
    copied.train()
    with pytest.raises(InputError, match="is in training mode"):
        copied(_ids(2))
    copied.eval()
    copied(_ids(2))


class _Flat(nn.Module):
    """A part whose rows lie in its first axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.part = nn.Embedding(40, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, ids: Tensor) -> Tensor:
        return self.part(self.words(ids)[0])  # type: ignore[no-any-return]


def test_rows_in_the_first_axis_are_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        fhe_fx.encrypt_submodule(
            _Flat(), "part", max_tokens=(2, 4), calibration=token_inputs(16, 4)
        )
    assert str(caught.value) == (
        "part: an input has shapes [2, 3], [4, 3] at the lengths that were asked for, so its first "
        "axis is not the batch, and no call says which length it has. Give one max_tokens."
    )


@pytest.mark.parametrize(
    ("given", "what"),
    [((), "a list of positive integers"), ([4, 0], "a list of positive integers"),
     ("4", "a positive integer"), (True, "a positive integer")],
)  # fmt: skip
def test_refuses_lengths_that_are_none(given: Any, what: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        fhe_fx.encrypt_submodule(tiny_gpt2(), "h.0.attn", max_tokens=given)
    assert str(caught.value) == f"max_tokens={given!r} is not {what}."


@pytest.mark.fhe
def test_circuits_share_keys(ladder: Any) -> None:
    found = fhe_fx.compile(ladder, verbose=False)
    two, four = (part.region.circuit() for part in encrypted_modules(ladder))
    assert two.keyset == four.keyset
    assert sorted(r.has_own_keys for r in found.regions) == [False, True]
    assert [r.tokens for r in found.regions] == [2, 4]
    assert {r.key_bytes for r in found.regions} == {found.as_dict()["key_bytes"]}
    assert "at 2 tokens" in found.regions[0].line()
    assert sorted("GB (shared)" in r.line() for r in found.regions) == [False, True]
    fhe_fx.set_mode(ladder, "execute")
    with torch.no_grad():
        for n in LENGTHS:
            assert ladder(_ids(n)).logits.shape == (1, n, 40)
    ours, theirs = (circuit._circuit.keys._keyset for circuit in (two, four))
    assert ours is theirs

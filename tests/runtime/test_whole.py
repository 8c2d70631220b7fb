"""All of a model encrypted: what stays with the client, how it is called, how near it is."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from torch import Tensor, fx, nn

import fhe_fx
from fhe_fx.api import encrypted_modules
from fhe_fx.backends.concrete.parties import (
    ConcreteClient,
    ConcreteServer,
    parse_evaluation_keys,
)
from fhe_fx.errors import ArtifactError, CaptureError, TargetError
from fhe_fx.export import load_client_bundles, load_client_model, load_server_bundle
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


def _texts(n: int) -> list[Tensor]:
    """Return every token at every place."""
    steps = torch.arange(n)
    return [((first + step * steps) % 16)[None] for first in range(16) for step in (5, 15)]


@pytest.fixture(scope="module")
def whole() -> Any:
    """Not to be changed but for its mode.

    Calibrated on every token at every place: on few samples, errors are those of values that leave
    their range, which no number of bits makes smaller.
    """
    texts = _texts(LENGTHS[-1])
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


@pytest.fixture(scope="module")
def coarse() -> Any:
    """A whole model that is cheap to execute. Not to be changed but for its mode."""
    return fhe_fx.encrypt_submodule(
        _small(), "", n_bits=4, max_tokens=2, calibration=_texts(2), options=Options(n_samples=32)
    )


def _modelled_error(model: Any) -> float:
    """Return what rounding, noise and overflow do to the logits, in parts of their deviation."""
    (cost,) = fhe_fx.report(model).regions
    assert cost.predicted_error is not None
    assert cost.overflow_error is not None
    return math.hypot(cost.predicted_error, cost.overflow_error)


def test_simulated_is_as_near_to_clear_as_the_noise_is_small(coarse: Any) -> None:
    """Up to a factor of two, which is what the model of the noise is worth in a deep circuit.

    Simulated on every token in both places: 1,024 logits. A wrong result errs by their deviation.
    """
    found = {}
    with torch.no_grad():
        exact = torch.cat([_small()(x).logits for x in _texts(2)])
        for mode in ("clear", "simulate"):
            fhe_fx.set_mode(coarse, mode)
            found[mode] = torch.cat([coarse(x).logits for x in _texts(2)])
    noise = float((found["simulate"] - found["clear"]).square().mean().sqrt() / exact.std())
    assert _modelled_error(coarse) < 0.2
    assert noise < 2 * _modelled_error(coarse)
    assert noise > _modelled_error(coarse) / 4  # it is simulated


@pytest.fixture(scope="module")
def written(coarse: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A whole model and where it was written for two parties."""
    directory = tmp_path_factory.mktemp("whole") / "out"
    coarse.save_pretrained(directory, validate=False)
    return coarse, directory


def test_two_parties_run_it(written: Any) -> None:
    """From their directories alone, with keys.

    One run, which may err by more than runs do on the average: by five times as much. A wrong
    result errs by more than the deviation of the logits.
    """
    model, directory = written
    client_files, server_files = directory / "client", directory / "server"
    (bundle,) = load_client_bundles(client_files).values()
    client = ConcreteClient(bundle.specs)
    client.keygen()
    (folder,) = server_files.iterdir()
    unpacked = directory.with_name("unpacked")
    unpacked.mkdir()
    for name, content in load_server_bundle(folder).files.items():
        (unpacked / name).write_bytes(content)
    server, keys = ConcreteServer(unpacked), parse_evaluation_keys(client.evaluation_keys())

    class Sent:
        def execute(self, inputs: Any) -> Any:
            return client.decrypt(server.run(client.encrypt(inputs), keys))

    loaded = load_client_model(client_files)
    assert type(loaded) is type(model)
    assert not list(loaded.parameters())
    (part,) = encrypted_modules(loaded)
    part.region.remote = Sent()
    fhe_fx.set_mode(loaded, "remote")
    fhe_fx.set_mode(model, "clear")
    with torch.no_grad():
        ours, theirs = loaded(_ids(2)).logits, model(_ids(2)).logits
        exact = _small()(_ids(2)).logits
    assert ours.shape == exact.shape
    error = float((ours - theirs).square().mean().sqrt() / exact.std())
    assert error < 5 * _modelled_error(model) < 1


def test_the_client_has_the_tables_and_nothing_else(written: Any) -> None:
    model, directory = written
    held = [
        tensor
        for path in (directory / "client").rglob("*.safetensors")
        for tensor in safetensors.load_file(path).values()
    ]

    def is_held(weight: Tensor) -> bool:
        return any(t.shape == weight.shape and torch.equal(t, weight) for t in held)

    state = model.state_dict()
    assert [name for name, w in state.items() if w.numel() > 8 and is_held(w)] == [
        "transformer.wte.weight"
    ]
    loaded: Any = load_client_model(directory)
    with pytest.raises(ArtifactError, match="was loaded from a client's directory"):
        loaded.save_pretrained(directory.with_name("again"))


def test_refuses_to_write_a_head_that_is_tied_to_the_tables(tmp_path: Any) -> None:
    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_inner": 8, "vocab_size": 16}
    model = fhe_fx.encrypt_submodule(
        tiny_gpt2(tie_word_embeddings=True, **sizes), "", max_tokens=2, options=FEW
    )
    with pytest.raises(ArtifactError, match="whoever has the one has the other") as refused:
        model.save_pretrained(tmp_path / "model")
    assert "wte.weight is encrypted" in str(refused.value)


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

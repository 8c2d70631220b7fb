"""The stand-in module: what it accepts, what it refuses and in which words."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx.errors import ArtifactError, InputError, OptionsError
from fhe_fx.runtime.module import keyed_leaves
from tests.models import Mlp, mlp_inputs


class Mixer(nn.Module):
    """Two inputs, a flag and a tuple of results, causal in their rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(
        self, x: Tensor, y: Tensor, gain: float = 1.0, bias: Tensor | None = None
    ) -> tuple[Tensor, None, dict[str, Tensor]]:
        mixed = torch.tanh(self.left(x) + self.right(y)) * gain
        return mixed, None, {"sum": x + y if bias is None else x + y + bias}


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Mixer()
        self.bias: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mixed, _, more = self.part(x, y, bias=self.bias)
        return mixed, more["sum"]


def _pair(rows: int = 4, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(0.4 * torch.randn(batch, rows, 3, generator=generator) for _ in range(2))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def mixed() -> Any:
    """Not to be changed but for its mode."""
    pairs = [_pair(seed=i) for i in range(8)]
    return fhe_fx.encrypt_submodule(Around(), "part", n_bits=8, calibration=pairs)


@pytest.fixture
def clear(mixed: Any) -> Any:
    fhe_fx.set_mode(mixed, "clear")
    return mixed


def _refusal(model: nn.Module, *inputs: Any) -> str:
    with pytest.raises(InputError) as caught:
        model(*inputs)
    return str(caught.value)


def test_leaves_have_names() -> None:
    assert keyed_leaves((1, [2]), {"a": {"b": 3}}) == {
        "args[0]": 1,
        "args[1][0]": 2,
        "kwargs['a']['b']": 3,
    }


def test_results_come_back_in_the_structure_of_the_module(clear: Any) -> None:
    x, y = _pair(seed=3)
    ours, theirs = clear.part(x, y), clear.part.original(x, y)
    assert isinstance(ours, tuple)
    assert ours[1] is None
    assert list(ours[2]) == ["sum"]
    torch.testing.assert_close(ours[0], theirs[0], atol=0.05, rtol=0)
    torch.testing.assert_close(ours[2]["sum"], theirs[2]["sum"], atol=0.05, rtol=0)


def test_a_batch_is_one_after_the_other(clear: Any) -> None:
    pairs = [_pair(seed=i) for i in (1, 2, 3)]
    together = clear(*[torch.cat(side) for side in zip(*pairs, strict=True)])
    alone = [clear(*pair) for pair in pairs]
    for k in range(2):
        assert torch.equal(together[k], torch.cat([a[k] for a in alone]))


def test_a_batch_of_one_serves_all(clear: Any) -> None:
    x, y = _pair(batch=3)
    one = y[:1]
    expected = torch.cat([clear(x[i : i + 1], one)[0] for i in range(3)])
    assert torch.equal(clear(x, one)[0], expected)


def test_shorter_inputs_are_padded_and_cut(clear: Any) -> None:
    x, y = _pair(batch=2)
    whole = clear(x, y)
    short = clear(x[:, :3], y[:, :3])
    assert short[0].shape == (2, 3, 3)
    assert torch.equal(short[0], whole[0][:, :3])
    assert torch.equal(short[1], whole[1][:, :3])


def test_values_out_of_range_are_clipped(clear: Any) -> None:
    x, y = _pair()
    far = clear(x * 1e6, y)[0]
    assert bool(torch.isfinite(far).all())
    assert float(far.abs().max()) < 1.5


def test_wrong_calls_are_refused(clear: Any) -> None:
    x, y = _pair()
    assert _refusal(clear.part, x) == (
        "part: the circuit encrypts args[1], which this call does not give as a tensor. "
        "Call the module as it was called when it was compiled."
    )
    assert _refusal(clear.part, x[0], y) == (
        "part: args[0] has shape [4, 3]; the circuit takes [batch, 4, 3]."
    )
    assert _refusal(clear.part, x[:0], y) == (
        "part: args[0] has shape [0, 4, 3]; the circuit takes [batch, 4, 3]."
    )
    assert _refusal(clear.part, torch.ones(1, 5, 3), torch.ones(1, 5, 3)) == (
        "part: args[0] has 5 rows in axis 1; the circuit was compiled for at most 4. "
        "Give fewer, or encrypt again with max_tokens=5."
    )
    assert _refusal(clear.part, torch.ones(1, 4, 6), y) == (
        "part: args[0] has 6 rows in axis 2; the circuit was compiled for at most 3. "
        "Give fewer, or encrypt again for the new shape."
    )
    assert _refusal(clear.part, x[:, :3], y) == (
        "part: args[0] has shape [1, 3, 3], args[1] has shape [1, 4, 3]; the circuit takes "
        "[1, 4, 3] and [1, 4, 3], all as long or all equally shorter."
    )
    assert _refusal(clear.part, x.expand(3, 4, 3), y.expand(2, 4, 3)) == (
        "part: batches of different sizes: args[0] has 3, args[1] has 2."
    )
    assert _refusal(clear.part, x, torch.full_like(y, torch.nan)) == (
        "part: args[1] holds nan or inf."
    )


def test_other_arguments_are_constants_of_the_circuit(clear: Any) -> None:
    x, y = _pair()
    text = _refusal(clear.part, x, y, 2.0)
    assert text.startswith(
        "part: args[2] is not what the circuit was compiled with, and changes the result by "
    )
    assert text.endswith(
        " of its range; the circuit holds it as a constant. If it is a padding mask, run each "
        "prompt alone and unpadded; if it is a cache, pass use_cache=False."
    )
    # An argument that changes nothing is welcome.
    assert torch.equal(clear.part(x, y, 1.0)[0], clear.part(x, y)[0])
    assert torch.equal(clear.part(x, y, bias=torch.zeros(3))[0], clear.part(x, y)[0])


def test_training_mode_is_refused(mixed: Any) -> None:
    model = copy.deepcopy(mixed).train()
    assert model.part.original.left.training
    fhe_fx.set_mode(model, "clear")
    assert _refusal(model, *_pair()) == (
        "part is in training mode; a circuit is one fixed function. Call model.eval()."
    )
    model.eval()
    assert not model.part.original.training
    model(*_pair())


def test_modes(mixed: Any) -> None:
    x, y = _pair()
    fhe_fx.set_mode(mixed, "disable")
    assert torch.equal(mixed(x, y)[0], Around()(x, y)[0])
    with pytest.raises(OptionsError) as caught:
        fhe_fx.set_mode(mixed, "claer")
    assert str(caught.value) == (
        "mode='claer' is not one of disable, clear, simulate, execute, remote. "
        "Did you mean 'clear'?"
    )
    with pytest.raises(OptionsError, match="mode=3 is not one of"):
        mixed.part.mode = 3
    with pytest.raises(OptionsError) as caught:
        fhe_fx.set_mode(mixed, "remote")
    assert str(caught.value) == (
        "part has no server. Connect to one first: "
        "fhe_fx.connect(url, client=DIR, token=..., model=model)."
    )
    assert mixed.part.mode == "disable"


def test_names_and_parameters_are_the_originals(mixed: Any) -> None:
    fhe_fx.set_mode(mixed, "disable")
    assert list(mixed.state_dict()) == list(Around().state_dict())
    assert [n for n, _ in mixed.named_parameters()] == [n for n, _ in Around().named_parameters()]
    assert mixed.part.left is mixed.part.original.left
    assert repr(mixed.part) == (
        "EncryptedModule(\n"
        "  Mixer, encrypted at [1, 4, 3] and [1, 4, 3], mode=disable\n"
        "  (left): Linear(in_features=3, out_features=3, bias=True)\n"
        "  (right): Linear(in_features=3, out_features=3, bias=True)\n"
        ")"
    )
    with pytest.raises(AttributeError):
        _ = mixed.part.no_such_thing


def test_a_leaf_module_says_what_it_was() -> None:
    model = fhe_fx.encrypt_submodule(Mlp(), "head", calibration=mlp_inputs())
    assert repr(model.head) == (
        "EncryptedModule(Linear(in_features=6, out_features=3, bias=True), "
        "encrypted at [1, 6], mode=disable)"
    )


def test_loading_other_weights_makes_the_circuit_stale(mixed: Any) -> None:
    model, x = copy.deepcopy(mixed), _pair()
    fhe_fx.set_mode(model, "clear")
    model.load_state_dict(Around().state_dict())  # the same
    model(*x)
    other = {k: 3 * v for k, v in model.state_dict().items()}
    model.load_state_dict(other)
    text = _refusal(model, *x)
    assert text.startswith("part.left.weight has changed since the circuit was made: its norm is ")
    assert text.endswith("Encrypt the float model again.")
    fhe_fx.set_mode(model, "disable")
    expected = Around()
    expected.load_state_dict(other)
    assert torch.equal(model(*x)[0], expected(*x)[0])


def test_a_deep_copy_has_its_own_weights_and_mode(mixed: Any) -> None:
    fhe_fx.set_mode(mixed, "clear")
    copied, x = copy.deepcopy(mixed), _pair()
    fhe_fx.set_mode(copied, "disable")
    assert mixed.part.mode == "clear"
    assert copied.part.left.weight.data_ptr() != mixed.part.left.weight.data_ptr()
    assert copied.part.left is copied.part.original.left
    fhe_fx.set_mode(copied, "clear")
    assert torch.equal(copied(*x)[0], mixed(*x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model(mixed: Any, dtype: torch.dtype) -> None:
    model = copy.deepcopy(mixed).to(dtype)
    assert model.part.original.left.weight.dtype == dtype
    x, y = (side.to(dtype) for side in _pair())
    fhe_fx.set_mode(mixed, "clear")
    for mode in ("disable", "clear"):
        fhe_fx.set_mode(model, mode)
        result = model(x, y)[0]
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), mixed(*_pair())[0], atol=0.1, rtol=0)
    # An argument that changes nothing is told from one that does in spite of the rounding.
    model.part(x, y, bias=torch.zeros(3, dtype=dtype))
    with pytest.raises(InputError, match="is not what the circuit was compiled with"):
        model.part(x, y, bias=torch.full((3,), 0.1, dtype=dtype))


class Flattened(nn.Module):
    """Its part sees all tokens of a batch in one axis, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.reshape(-1, 3)).reshape(x.shape[0], -1, 2)  # type: ignore[no-any-return]


class Turned(nn.Module):
    """Its part returns rows before the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Tanh(), _Swap())

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x).transpose(0, 1)  # type: ignore[no-any-return]


class _Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


def test_the_batch_may_be_part_of_the_first_axis() -> None:
    samples = [_pair(seed=i)[0] for i in range(8)]
    model = fhe_fx.encrypt_submodule(Flattened(), "part", calibration=samples)
    fhe_fx.set_mode(model, "clear")
    together = model(torch.cat(samples[:3]))
    assert torch.equal(together, torch.cat([model(s) for s in samples[:3]]))
    assert _refusal(model, samples[0][:, :3]) == (
        "part: args[0] has shape [3, 3]; the circuit takes [batch * 4, 3]."
    )


def test_a_batch_is_refused_where_the_result_has_no_batch_axis() -> None:
    samples = [_pair(seed=i)[0] for i in range(8)]
    model = fhe_fx.encrypt_submodule(Turned(), "part", calibration=samples)
    fhe_fx.set_mode(model, "clear")
    assert model(samples[0]).shape == (1, 4, 3)
    assert _refusal(model, torch.cat(samples[:2])) == (
        "part: the first axis of a result of shape [4, 1, 3] is not the batch. "
        "Run the samples one by one."
    )


def test_pickling_is_refused(mixed: Any) -> None:
    with pytest.raises(ArtifactError) as caught:
        torch.save(mixed, io.BytesIO())
    assert str(caught.value) == (
        "part: an encrypted part cannot be pickled. Save the float model (its state_dict has the "
        "same names) and encrypt it again, or write the circuit with `fhe-fx export`."
    )


class Constant(nn.Module):
    """Its part returns a constant, a result that nothing reads, and one that is read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = _Three()

    def forward(self, x: Tensor) -> Tensor:
        constant, _, result = self.part(x)
        return constant + result  # type: ignore[no-any-return]


class _Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.inner(x)
        return torch.arange(6.0), y.exp(), torch.tanh(y)


def test_results_that_are_constant_or_not_read() -> None:
    model = Constant()
    result = fhe_fx.encrypt_submodule(model, "part", n_bits=8, calibration=mlp_inputs(32))
    fhe_fx.set_mode(result, "clear")
    x = mlp_inputs()[0]
    torch.testing.assert_close(result(x), model(x), atol=0.05, rtol=0)
    constant, unread, _ = result.part(x)
    assert torch.equal(constant, torch.arange(6.0))
    assert unread is None


def test_gradients_stop_at_the_circuit(clear: Any) -> None:
    x, y = _pair()
    result = clear(x.requires_grad_(), y)[0]
    assert not result.requires_grad

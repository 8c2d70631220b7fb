"""Bad input to `encrypt_submodule`: one clear error each, and nothing half-done."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fhe_fx
from fhe_fx import Options
from fhe_fx.errors import (
    BitWidthError,
    CalibrationError,
    CaptureError,
    FheFxError,
    InputError,
    OptionsError,
    TargetError,
    UnsupportedOpError,
)
from fhe_fx.quant.calibration import as_call
from tests.models import FEW, Mlp, mlp_inputs, tiny_gpt2, token_inputs

NAN = torch.full((1, 6), torch.nan)


def _refusal(kind: type[FheFxError], model: Any, target: Any = "inner", **kwargs: Any) -> str:
    """Return the message, after a check that the model was left alone."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(kind) as caught:
        fhe_fx.encrypt_submodule(model, target, **kwargs)
    assert type(caught.value) is kind
    if isinstance(model, nn.Module):
        assert list(model.modules()) == modules
        assert all(
            torch.equal(model.state_dict()[k], v) or bool(v.isnan().any())
            for k, v in before.items()
        )
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    return str(caught.value)


def _mlp(**kwargs: Any) -> dict[str, Any]:
    return {"calibration": mlp_inputs(), **kwargs}


# What to encrypt ------------------------------------------------------------------------------


def test_no_module() -> None:
    text = _refusal(CaptureError, {"inner": 1})
    assert text == "The model is a dict; give a torch.nn.Module."


def test_no_such_part() -> None:
    text = _refusal(TargetError, Mlp(), "iner", **_mlp())
    assert text == "Mlp has no submodule 'iner'. Did you mean 'inner' or 'inner.2' or 'inner.1'?"


def test_encrypted_already() -> None:
    once = fhe_fx.encrypt_submodule(Mlp(), "inner", **_mlp())
    for target in ("inner", "inner.0"):
        text = _refusal(TargetError, once, target, **_mlp())
        assert text == (
            f"{target} cannot be encrypted: inner is already. Start from the float model."
        )


@pytest.mark.parametrize("heads", [0, "0", [0.5], [True], [None]])
def test_heads_that_are_no_numbers(heads: Any) -> None:
    text = _refusal(TargetError, tiny_gpt2(), "h.0.attn", heads=heads)
    assert text == f"heads={heads!r} is not a list of head numbers. Try heads=[0]."


def test_a_part_that_is_not_called() -> None:
    text = _refusal(CaptureError, tiny_gpt2(), "transformer.h", max_tokens=4, options=FEW)
    assert text == (
        "transformer.h, a ModuleList, is not called when the model runs on its example, so it has "
        "no arguments and results of its own. Choose a submodule that is called, such as "
        "'transformer.h.0'."
    )


def test_a_part_that_reads_token_numbers() -> None:
    text = _refusal(CaptureError, tiny_gpt2(), "wte", max_tokens=4, options=FEW)
    assert text == (
        "transformer.wte only takes rows of tables by integers, which the client does in the "
        "clear. Choose a submodule that computes something with them."
    )


class _Aside(nn.Module):
    """Its part reads a tensor that is not among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.part = _Reader()

    def forward(self, x: Tensor) -> Tensor:
        self.part.aside = torch.tanh(x)
        return self.part(x)  # type: ignore[no-any-return]


class _Reader(nn.Module):
    aside: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.aside


class _Writer(nn.Module):
    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.tanh(x)
        return 2 * x


class _Behind(nn.Module):
    """It reads a tensor of its part that is not among the part's results."""

    def __init__(self) -> None:
        super().__init__()
        self.part = _Writer()

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return y + self.part.kept  # type: ignore[no-any-return]


def test_values_that_enter_or_leave_on_the_side() -> None:
    text = _refusal(CaptureError, _Aside(), "part", **_mlp())
    assert text.startswith("part reads 1 value(s) that depend on the model's input but are not ")
    assert "\n  tanh    test_bad_input.py:" in text
    text = _refusal(CaptureError, _Behind(), "part", **_mlp())
    assert text.startswith("part: tanh (test_bad_input.py:")
    assert text.endswith(
        ") is used outside but is not among the module's results. "
        "Encrypt the submodule that returns it."
    )


class _Sorts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = _Sorter()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)  # type: ignore[no-any-return]


class _Sorter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(x).values + torch.cummax(x, -1).values


def test_operators_without_a_lowering_are_all_listed() -> None:
    text = _refusal(UnsupportedOpError, _Sorts(), "part", **_mlp())
    first, *listed, last = text.splitlines()
    assert first == "part: 2 operator(s) cannot run on encrypted data."
    assert [line.split()[:2] for line in listed] == [
        ["aten.sort.default", "part"],
        ["aten.cummax.default", "part"],
    ]
    assert last.startswith("Encrypt a submodule without them, or register a lowering for each: ")


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = _Brancher()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)  # type: ignore[no-any-return]


class _Brancher(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.max() > 0.5) else 2 * x


def test_data_dependent_control_flow() -> None:
    text = _refusal(CaptureError, _Branches(), "part", **_mlp())
    assert text.startswith("_Branches branches on the values of its tensors (test_bad_input.py:")


# Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bits": 0}, "n_bits=0 is outside [1, 16]."),
        ({"n_bits": 17}, "n_bits=17 is outside [1, 16]."),
        (
            {"n_bits": 15},
            (
                "n_bits=15 makes look-ups of 17 bits (n_bits + 2); at most 16 can be compiled. "
                "Try n_bits=14 or less."
            ),
        ),
        ({"n_bits": 4.0}, "n_bits=4.0 is not an integer. Try n_bits=1."),
        ({"n_bits": "4"}, "n_bits='4' is not an integer. Try n_bits=1."),
        ({"n_bits": True}, "n_bits=True is not an integer. Try n_bits=1."),
        ({"input_bits": 1}, "input_bits=1 is outside [2, 16]."),
        ({"weight_bits": 99}, "weight_bits=99 is outside [2, 16]."),
        (
            {"target_agreement": 97},
            "target_agreement=97 is not a part between 0 and 1. Try target_agreement=0.97.",
        ),
        (
            {"target_agreement": 0.97, "max_cost": 1e9},
            "Give max_cost or target_agreement, not both: one is what the other costs.",
        ),
        ({"p_error": 0}, "p_error=0 is not a probability between 0 and 1. Try p_error=0.1."),
        ({"p_error": 1.0}, "p_error=1.0 is not a probability between 0 and 1. Try p_error=0.1."),
        (
            {"p_error": "x"},
            "p_error='x' is not a probability between 0 and 1. Try p_error=0.1.",
        ),
        (
            {"p_error": float("nan")},
            "p_error=nan is not a probability between 0 and 1. Try p_error=0.1.",
        ),
    ],
)
def test_numbers_outside_their_domain(options: dict[str, Any], message: str) -> None:
    assert _refusal(OptionsError, Mlp(), **_mlp(**options)) == message
    with pytest.raises(OptionsError) as caught:
        Options(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize("max_tokens", [0, -3, 2.5, "8", True])
def test_max_tokens(max_tokens: Any) -> None:
    text = _refusal(CalibrationError, tiny_gpt2(), "h.0.attn", max_tokens=max_tokens)
    assert text == f"max_tokens={max_tokens!r} is not a positive integer."


def test_more_tokens_than_the_model_has_positions() -> None:
    text = _refusal(CalibrationError, tiny_gpt2(), "h.0.attn", max_tokens=20, options=FEW)
    assert text.startswith(
        "GPT2LMHeadModel cannot sample its own calibration inputs: it fails on 17 tokens ("
    )
    assert text.endswith("). Pass calibration=[...], or a smaller max_tokens.")


@pytest.mark.fhe
@pytest.mark.filterwarnings("ignore:.*pkg_resources:UserWarning")
@pytest.mark.filterwarnings("ignore:.*pkg_resources:DeprecationWarning")
def test_bits_for_which_no_parameters_exist() -> None:
    model = fhe_fx.encrypt_submodule(Mlp(), "inner", **_mlp(n_bits=12))
    with pytest.raises(BitWidthError) as caught:
        fhe_fx.compile(model)
    first, *_, last = str(caught.value).splitlines()
    assert first.startswith(
        "inner: no parameters of 128-bit security exist for this circuit. Its widest look-up reads "
        "14 of "
    )
    assert re.fullmatch(r"Try n_bits=10: it compiles, with keys of \d+\.\d GB\.", last)
    fhe_fx.set_mode(model, "clear")
    model(mlp_inputs()[0])


def test_weights_that_are_no_numbers() -> None:
    model = Mlp()
    next(model.inner.parameters()).data[0, :2] = torch.nan
    model.head.weight.data[0, 0] = torch.inf
    assert _refusal(CalibrationError, model, "inner", **_mlp()) == (
        "inner.0.weight holds 2 values that are nan or inf. Load the weights again."
    )
    gpt2 = tiny_gpt2()
    gpt2.lm_head.weight.data[:] = torch.nan  # outside the target, and tied to the embedding
    assert _refusal(CalibrationError, gpt2, "h.0.attn", max_tokens=4, options=FEW) == (
        "GPT2LMHeadModel returns nan or inf on 1 tokens of its own. Load its weights again."
    )


# Calibration ----------------------------------------------------------------------------------


def _endless() -> Iterator[Any]:
    yield "a sentence"


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration is empty. Give some inputs, or leave it out."),
        (3, "calibration is a int; give a list of model inputs."),
        ("text", "calibration is a str; give a list of model inputs."),
        (
            _endless(),
            (
                "A model input is a str; give a tensor, a tuple of tensors, or a mapping of "
                "keyword arguments (as a tokenizer returns)."
            ),
        ),
        ([*mlp_inputs(3), NAN], "Calibration input 3 holds nan or inf."),
        (
            mlp_inputs(1),
            (
                "1 calibration input(s) have the example's shapes [(1, 6)]; at least 2 are needed, "
                "and some dozens are wise."
            ),
        ),
        (
            [torch.ones(1, 6), torch.ones(1, 7)],
            (
                "1 calibration input(s) have the example's shapes [(1, 6)]; at least 2 are needed, "
                "and some dozens are wise."
            ),
        ),
    ],
)
def test_calibration_that_cannot_be_used(calibration: Any, message: str) -> None:
    assert _refusal(CalibrationError, Mlp(), calibration=calibration) == message


def test_no_calibration_where_the_model_cannot_write_its_own() -> None:
    assert _refusal(CalibrationError, Mlp()) == (
        "Mlp has no vocabulary to sample inputs from. "
        "Pass calibration=[...]: some dozens of real inputs."
    )


def test_calibration_of_the_wrong_width() -> None:
    text = _refusal(CaptureError, Mlp(), calibration=[0.3 * x[:, :5] for x in mlp_inputs()])
    assert text.startswith("torch.export cannot capture Mlp: ")
    assert "\n" not in text


def test_token_numbers_outside_the_vocabulary() -> None:
    wrong = [*token_inputs(3), torch.tensor([[1, 2, 3, 4000]])]
    text = _refusal(CalibrationError, tiny_gpt2(), "h.0.attn", calibration=wrong)
    assert text == (
        "GPT2LMHeadModel does not run on one of its calibration inputs: IndexError: index out of "
        "range in self. Give inputs that the model takes."
    )


def test_sentences_that_are_too_short() -> None:
    short = token_inputs(8, tokens=3)
    gpt2 = tiny_gpt2()
    assert _refusal(CalibrationError, gpt2, "h.0.attn", calibration=short, max_tokens=5) == (
        "None of the 8 calibration inputs has 5 tokens or more. "
        "Give longer ones, or a smaller max_tokens."
    )
    text = _refusal(
        CalibrationError, gpt2, "h.0.attn", example=short[0], calibration=short, max_tokens=5
    )
    assert text == (
        "The example has 3 tokens, fewer than max_tokens=5. "
        "Give a longer one, or leave one of the two out."
    )


def test_a_calibration_mask_with_zeros() -> None:
    padded = {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    text = _refusal(CalibrationError, tiny_gpt2(), "h.0.attn", calibration=[padded] * 4)
    assert text == (
        "A calibration input has an attention_mask with zeros. Give unpadded inputs, one each."
    )


def _noise_warning(reason: str) -> str:
    return (
        f"The calibration data look like random noise ({reason}). Ranges found on noise do not fit "
        f"real inputs. Give real inputs, or leave calibration out: the model then samples its own."
    )


@pytest.mark.parametrize(
    ("model", "target", "calibration", "reason"),
    [
        (Mlp, "inner", lambda g: torch.randn(64, 6, generator=g), "standard normal values"),
        (Mlp, "inner", lambda g: torch.rand(64, 6, generator=g), "values uniform on [0, 1]"),
        (
            lambda: tiny_gpt2(vocab_size=5000),
            "h.0.attn",
            lambda g: torch.randint(5000, (32, 4), generator=g),
            "token numbers without repetition",
        ),
    ],
)
def test_noise_is_warned_of(model: Any, target: str, calibration: Any, reason: str) -> None:
    data = calibration(torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fhe_fx.encrypt_submodule(model(), target, calibration=list(data.split(1)))
    ours = [w for w in caught if "calibration" in str(w.message)]
    assert [str(w.message) for w in ours] == [_noise_warning(reason)]
    assert ours[0].category is UserWarning
    assert ours[0].filename == __file__


@pytest.mark.parametrize(
    "calibration",
    [
        lambda: torch.cat(mlp_inputs()),
        lambda: {"x": torch.cat(mlp_inputs())},
        lambda: [torch.cat(mlp_inputs())],
        lambda: [(x,) for x in mlp_inputs()],
        lambda: [{"x": x} for x in mlp_inputs()],
        lambda: (x for x in mlp_inputs()),
    ],
)
def test_calibration_in_its_many_forms(calibration: Any) -> None:
    made = fhe_fx.encrypt_submodule(Mlp(), "inner", calibration=calibration())
    expected = fhe_fx.encrypt_submodule(Mlp(), "inner", calibration=mlp_inputs())
    for model in (made, expected):
        fhe_fx.set_mode(model, "clear")
    x = mlp_inputs()[0]
    assert torch.equal(made(x), expected(x))


def test_as_call_reads_lists_of_tensors() -> None:
    x = torch.ones(2)
    assert as_call([x, x]).args == (x, x)
    assert as_call(as_call(x)).args == (x,)


# At run time ----------------------------------------------------------------------------------


def test_inputs_that_do_not_fit() -> None:
    model = fhe_fx.encrypt_submodule(Mlp(), "inner", **_mlp())
    fhe_fx.set_mode(model, "clear")
    with pytest.raises(InputError) as caught:
        model(NAN)
    assert str(caught.value) == "inner: args[0] holds nan or inf."
    with pytest.raises(InputError) as caught:
        model.inner(torch.ones(1, 2, 6))
    assert str(caught.value) == (
        "inner: args[0] has shape [1, 2, 6]; the circuit takes [batch, 6]."
    )
    model(mlp_inputs()[0])  # and it still works

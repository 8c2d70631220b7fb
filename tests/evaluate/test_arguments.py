"""Ranges of bits and modes, and each refusal with its sentence."""

from __future__ import annotations

import pytest

from fhe_fx.errors import OptionsError
from fhe_fx.evaluate.arguments import parse_bits, parse_modes


@pytest.mark.parametrize(
    ("text", "bits"),
    [("4", [4]), ("2..4", [2, 3, 4]), ("2,4, 6", [2, 4, 6]), ("3..4,4,2", [3, 4, 2])],
)
def test_bits(text: str, bits: list[int]) -> None:
    assert parse_bits(text) == bits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8..2", "--n-bits 8..2 runs backwards. Write 2..8."),
        ("", "--n-bits '' is not a number, a list or a range. Write 4, 2,4,6 or 2..8."),
        ("-3", "--n-bits '-3' is not a number, a list or a range. Write 4, 2,4,6 or 2..8."),
        ("2...4", "--n-bits '2...4' is not a number, a list or a range. Write 4, 2,4,6 or 2..8."),
        ("0..3", "n_bits=0 is outside [1, 16]."),
        ("2..99999999999", "n_bits=99999999999 is outside [1, 16]."),
    ],
)
def test_bits_refused(text: str, message: str) -> None:
    with pytest.raises(OptionsError) as caught:
        parse_bits(text)
    assert str(caught.value) == message


def test_modes_become_stages_in_the_order_of_the_way() -> None:
    assert parse_modes("simulate, clear") == ["clear", "simulated"]
    assert parse_modes("fake") == ["fake_quantized"]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(OptionsError) as caught:
        parse_modes("clear,simulated")
    assert str(caught.value) == (
        "--modes 'simulated' is not one of fake, clear, simulate. Did you mean 'simulate'?"
    )

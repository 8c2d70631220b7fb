"""One name four ways: pass, file, class, test file."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from fhe_fx.passes import registered

TESTS = Path(__file__).parent


@pytest.mark.parametrize("name", sorted(registered()))
def test_a_pass_has_one_name(name: str) -> None:
    cls = registered()[name]
    module = inspect.getmodule(cls)
    assert module is not None
    stem = name.replace("-", "_")
    assert module.__name__.rsplit(".", 1)[-1] == stem
    assert cls.__name__ == "".join(word.capitalize() for word in name.split("-"))
    assert (TESTS / f"test_{stem}.py").exists()


@pytest.mark.parametrize("name", sorted(registered()))
def test_a_law_says_what_a_pass_preserves(name: str) -> None:
    cls = registered()[name]
    sentences = cls.law().split(". ")
    assert len(sentences) == 2
    assert sentences[1].endswith(".")
    assert sentences[1].startswith(("Exact", "Equal to", "Not exact"))
    assert sentences[1].startswith("Not exact") is not cls.is_exact

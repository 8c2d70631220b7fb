"""Naming submodules: paths, suffixes, globs, expressions, and each refusal's exact sentence."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fhe_fx.capture import resolve_targets
from fhe_fx.errors import TargetError
from tests.models import Mlp, tiny_gpt2


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny_gpt2()


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_gpt2(is_base=True)


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("transformer.h.0.attn", ["transformer.h.0.attn"]),
        ("h.0.attn", ["transformer.h.0.attn"]),
        ("0.attn", ["transformer.h.0.attn"]),
        ("lm_head", ["lm_head"]),
        (["h.1.attn", "h.0.attn"], ["transformer.h.0.attn", "transformer.h.1.attn"]),
        (("h.0.attn", "transformer.h.0.attn"), ["transformer.h.0.attn"]),
        ("h.*.attn", ["transformer.h.0.attn", "transformer.h.1.attn"]),
        ("h.[1].attn", ["transformer.h.1.attn"]),
        ("*.mlp", ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
        (r"re:.*\.attn", ["transformer.h.0.attn", "transformer.h.1.attn"]),
        (r"re:transformer\.h\.1\..*proj", None),
        (["h.0.attn", "h.*.mlp"], None),
    ],
)
def test_what_a_target_names(gpt2: Any, target: Any, found: list[str] | None) -> None:
    known = dict(gpt2.named_modules())
    paths = resolve_targets(gpt2, target)
    assert all(p in known for p in paths)
    assert paths == sorted(paths, key=list(known).index)
    if found is not None:
        assert paths == found


@pytest.mark.parametrize("target", ["", [""]])
def test_the_model_itself(gpt2: Any, target: Any) -> None:
    assert resolve_targets(gpt2, target) == [""]


def test_a_suffix_works_on_both_gpt2_classes(gpt2: Any, base: Any) -> None:
    assert resolve_targets(base, "h.0.attn") == ["h.0.attn"]
    assert resolve_targets(gpt2, "h.0.attn") == ["transformer.h.0.attn"]


def test_an_exact_path_wins_over_a_suffix() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.ModuleDict({"a": nn.Linear(1, 1)})})
    assert resolve_targets(model, "a") == ["a"]


def test_a_suffix_is_made_of_whole_names(gpt2: Any) -> None:
    with pytest.raises(TargetError):
        resolve_targets(gpt2, "ttn")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "attn",
            (
                "'attn' is ambiguous in GPT2LMHeadModel: 2 submodules end so: "
                "transformer.h.0.attn, transformer.h.1.attn. Give a longer suffix, or a glob "
                "('*.attn') to take all."
            ),
        ),
        (
            "h.0.atn",
            (
                "GPT2LMHeadModel has no submodule 'h.0.atn'. "
                "Did you mean 'h.0.attn' or 'h.1.attn' or '0.attn'?"
            ),
        ),
        ("h.*.zzzzzzzz", "GPT2LMHeadModel has no submodule 'h.*.zzzzzzzz'."),
        ("re:zzz", "GPT2LMHeadModel has no submodule 're:zzz'."),
        (
            ["", "h.0"],
            (
                "'' is the model itself, in which all other targets lie; a part can be encrypted "
                "once. Keep '' or the others."
            ),
        ),
        (
            "re:(",
            "'re:(' is not a regular expression: missing ), unterminated subpattern at position 0.",
        ),
        ([], "The list of targets is empty. Name at least one submodule."),
        (
            ["h.0", "h.0.attn"],
            (
                "'transformer.h.0.attn' lies inside 'transformer.h.0'; a part can be encrypted "
                "once. Keep one of the two."
            ),
        ),
        (
            None,
            (
                "target=None is not a path of a submodule. "
                "Give a string such as 'h.0.attn', or a list of strings."
            ),
        ),
        (
            [0],
            (
                "target=[0] is not a path of a submodule. "
                "Give a string such as 'h.0.attn', or a list of strings."
            ),
        ),
    ],
)
def test_refusals(gpt2: Any, target: Any, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        resolve_targets(gpt2, target)
    assert str(caught.value) == message


def test_many_matches_are_cut_short() -> None:
    model = nn.Module()
    for i in range(12):
        model.add_module(f"part{i}", Mlp())
    with pytest.raises(
        TargetError, match=r"12 submodules end so: part0\.head, .*part7\.head, \.\.\."
    ):
        resolve_targets(model, "head")

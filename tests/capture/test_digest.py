"""What makes a model another one: weights, configuration, and the code that it runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fhe_fx import Options
from fhe_fx.capture.digest import digest_of_model
from fhe_fx.export.cache import Cache
from tests.models import tiny_gpt2

CODE = """
import torch
from torch import nn

def weigh(scores):
    return scores{change}

class Mixes(nn.Module):
    def forward(self, x):
        return weigh(x.cumsum(1)){other}
"""


class Model(nn.Module):
    """A language model that mixes words by a module of the user's own."""

    def __init__(self, mixes: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = type("Config", (), {"vocab_size": 32, "bos_token_id": 0})()
        self.words = nn.Embedding(32, 8)
        self.mixes, self.head = mixes, nn.Linear(8, 32)

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.head(self.mixes(self.words(input_ids)))
        return type("Output", (), {"logits": logits})()


def _model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: str = "", other: str = ""
) -> Model:
    """Return a model whose mixing has been edited in its file, and loaded again."""
    (folder / "users_own.py").write_text(CODE.format(change=change, other=other))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("users_own", None)
    importlib.invalidate_caches()
    return Model(importlib.import_module("users_own").Mixes()).eval()


def test_code_of_a_module_and_of_what_it_calls_is_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [
        digest_of_model(_model(tmp_path, monkeypatch, *edit))
        for edit in [(), (), (" * 2",), ("", " + 0.0")]
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_calibration_text_is_written_again_when_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, options = Cache(tmp_path / "cache"), Options(n_samples=4)
    for change, entries in (("", 1), ("", 1), (".cos()", 2)):
        cache.sampled(_model(tmp_path, monkeypatch, change), 3, options)
        assert len(cache.entries()) == entries


def test_rounding_is_no_other_content() -> None:
    model = tiny_gpt2()
    digest = digest_of_model(model)
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x) * (1 + 1e-6)
    assert digest_of_model(model) == digest
    model.lm_head.forward = lambda x: head(x.relu())
    assert digest_of_model(model) != digest

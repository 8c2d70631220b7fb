"""Texts: files good and bad, the model's own, and what is kept of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fhe_fx.capture.digest import digest_of_model
from fhe_fx.errors import OptionsError
from fhe_fx.evaluate import DataError, read_texts, sample_texts
from fhe_fx.evaluate import texts as module
from fhe_fx.evaluate.texts import cache_directory, overlap
from tests.models import tiny_gpt2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def letters(line: str) -> dict[str, list[int]]:
    """Tokenize by letters."""
    return {"input_ids": [ord(c) % 32 for c in line]}


def _file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "sentences.txt"
    path.write_bytes(content)
    return path


def test_a_sentence_a_line(tmp_path: Path) -> None:
    found = read_texts(_file(tmp_path, "abc\n\n  de \r\n\ufeff".encode("utf-8-sig")), letters, 3)
    assert [len(r) for r in found.rows][:2] == [3, 2]
    assert found.notes == ()


def test_longer_lines_are_cut_split_or_refused(tmp_path: Path) -> None:
    path = _file(tmp_path, b"abcdefg\nab\n")
    said = "1 of 2 lines have more than 3 tokens, up to 7"
    cut = read_texts(path, letters, 3)
    assert [r.tolist() for r in cut.rows] == [[1, 2, 3], [1, 2]]
    assert cut.notes == (f"{said}; they were cut",)
    split = read_texts(path, letters, 3, "split")
    assert [r.tolist() for r in split.rows] == [[1, 2, 3], [4, 5, 6], [7], [1, 2]]
    assert split.notes == (f"{said}; they were split",)
    with pytest.raises(DataError) as caught:
        read_texts(path, letters, 3, "error")
    assert str(caught.value) == f"{path}: {said}. Give --tokens 7, or --long cut or split."


def test_bad_files_are_refused(tmp_path: Path) -> None:
    def refused(path: Path, tokenizer: Any = letters) -> str:
        with pytest.raises(DataError) as caught:
            read_texts(path, tokenizer, 3)
        return str(caught.value).replace(str(path), "FILE")

    assert refused(tmp_path / "none.txt") == "There is no file FILE."
    assert refused(_file(tmp_path, b" \n\n")) == "FILE holds no sentence. Give one a line."
    assert refused(_file(tmp_path, b"ab\n\xff\n")) == (
        "FILE is not UTF-8: byte 3 is 0xff. Convert it, for instance with iconv -t UTF-8."
    )
    assert refused(tmp_path) == "FILE cannot be read: Is a directory."
    nothing: Any = lambda line: {"input_ids": []}  # noqa: E731
    assert refused(_file(tmp_path, b"ab"), nothing) == (
        "FILE: the tokenizer makes no token of any line."
    )


def test_an_unknown_treatment_of_long_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"--long 'cute' is not one of cut, split, error"):
        read_texts(tmp_path, letters, 3, "cute")


def test_overlap_is_of_whole_sentences() -> None:
    calibration = [torch.tensor([1, 2, 3, 4]), torch.tensor([11, 2])]
    rows = [torch.tensor(r) for r in ([2, 3], [1, 2, 3, 4], [4, 11], [1, 3], [1, 2, 3, 4, 1])]
    assert overlap(rows, calibration) == 2 / 5
    assert overlap([torch.tensor([1, 1])], [torch.tensor([11, 1, 12])]) == 0.0


# Texts of the model's own ---------------------------------------------------------------------


def test_samples_are_the_models_own_and_kept() -> None:
    model = tiny_gpt2()
    said: list[str] = []
    first = sample_texts(model, 70, 5, seed=1, on_progress=said.append)
    assert [tuple(r.shape) for r in first] == [(5,)] * 70
    assert len({tuple(r.tolist()) for r in first}) > 60
    again = sample_texts(model, 70, 5, seed=1, on_progress=said.append)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert said == ["sampling 70 texts of 5 tokens from the model"]
    other = sample_texts(model, 70, 5, seed=2)
    assert not torch.equal(torch.stack(first), torch.stack(other))


def test_other_weights_write_texts_of_their_own() -> None:
    model = tiny_gpt2()
    digest = digest_of_model(model)
    sample_texts(model, 2, 3, seed=0)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert digest_of_model(model) != digest
    sample_texts(model, 2, 3, seed=0)
    assert len(list(cache_directory().glob("*.npy"))) == 2


def test_sampling_leaves_the_random_state_alone() -> None:
    model = tiny_gpt2()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    sample_texts(model, 3, 3, seed=0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY garbage", None])
def test_a_kept_file_that_is_broken_is_written_anew(content: bytes | None) -> None:
    model = tiny_gpt2()
    first = torch.stack(sample_texts(model, 2, 3, seed=0))
    (path,) = cache_directory().glob("*.npy")
    if content is None:
        np.save(path, np.zeros((9, 9)))
    else:
        path.write_bytes(content)
    assert torch.equal(torch.stack(sample_texts(model, 2, 3, seed=0)), first)


def test_the_oldest_kept_files_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_FILES", 2)
    model = tiny_gpt2()
    for seed in range(3):
        sample_texts(model, 1, 3, seed=seed)
        for age, path in enumerate(sorted(cache_directory().glob("*.npy"), key=os.path.getmtime)):
            os.utime(path, (age + 1, age + 1))
    assert len(list(cache_directory().glob("*.npy"))) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/no")
    assert len(sample_texts(tiny_gpt2(), 2, 3, seed=0)) == 2


def test_a_model_without_words_is_refused() -> None:
    from fhe_fx.errors import CalibrationError

    with pytest.raises(CalibrationError, match="Linear has no vocabulary to sample inputs from"):
        sample_texts(nn.Linear(2, 2), 2, 3, seed=0)

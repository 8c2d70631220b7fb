"""Pipelines as text and as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhe_fx.cli import app
from fhe_fx.errors import PassError
from fhe_fx.extend import parse_pipeline, read_pipeline
from fhe_fx.passes import default_pipeline
from fhe_fx.passes.fold_scales import FoldScales

LIKE_FUSE_MAP = "Did you mean 'fuse-maps' or 'fuse-linears' or 'merge-maps'?"


def refused(text: str) -> str:
    with pytest.raises(PassError) as error:
        parse_pipeline(text)
    return str(error.value)


def test_the_text_of_a_pipeline_is_read_back() -> None:
    pipeline = default_pipeline()
    text = str(pipeline)
    assert text.startswith("normalize,sink-selections,fold-scales{may_copy=false},")
    assert parse_pipeline(text) == pipeline
    assert parse_pipeline("default") == pipeline


def test_edits() -> None:
    pipeline = parse_pipeline(
        "default, -drop-idle-maps, fold-scales{may_copy=false}@before:allot-bits,"
        "fuse-maps@for:limit-factors, hoist-maps@after:normalize"
    )
    expected = (
        default_pipeline()
        .drop("drop-idle-maps")
        .insert_before("allot-bits", FoldScales(may_copy=False))
    )
    names = [p.name for p in expected]
    names[names.index("limit-factors")] = "fuse-maps"
    names.insert(1, "hoist-maps")
    assert [p.name for p in pipeline] == names
    assert FoldScales(may_copy=False) in pipeline.passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" , ", "The pipeline is empty. Write 'default', or names of passes."),
        (
            "fuse-map",
            f"There is no pass 'fuse-map'. {LIKE_FUSE_MAP}",
        ),
        (
            "default,-fuse-map",
            f"No pass 'fuse-map' in this pipeline. {LIKE_FUSE_MAP}",
        ),
        ("fuse-maps{bits=2}", "Pass fuse-maps has no option 'bits'. It has none."),
        (
            "fold-scales{may_cpy=true}",
            "Pass fold-scales has no option 'may_cpy'. It has may_copy. Did you mean 'may_copy'?",
        ),
        (
            "fold-scales{may_copy=3}",
            "Pass fold-scales: may_copy=3 is a int; may_copy is a bool, as in may_copy=true.",
        ),
        (
            "default,fuse-maps@near:allot-bits",
            "'fuse-maps@near:allot-bits': write @before:other, @after:other or @for:other.",
        ),
        (
            "fuse maps",
            (
                "'fuse maps' is not an item of a pipeline. Write name, name{option=value}, "
                "-name, or name@before:other."
            ),
        ),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    assert refused(text) == message


def write(directory: Path, text: str) -> Path:
    path = directory / "pipeline.toml"
    path.write_text(text)
    return path


def test_a_file_changes_the_default_pipeline(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        drop = ["drop-idle-maps"]
        [[pass]]
        name = "fold-scales"
        before = "allot-bits"
        options = { may_copy = false }
        """,
    )
    assert read_pipeline(path) == parse_pipeline(
        "default,-drop-idle-maps,fold-scales{may_copy=false}@before:allot-bits"
    )


def test_a_file_lists_a_pipeline(tmp_path: Path) -> None:
    path = write(tmp_path, 'passes = ["normalize", "fold-scales{may_copy=false}"]')
    assert str(read_pipeline(path)) == "normalize,fold-scales{may_copy=false}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes = 3", "passes is not a list of strings."),
        (
            "pases = []",
            "'pases' is not an entry of a pipeline file. Did you mean 'passes' or 'pass'?",
        ),
        (
            '[[pass]]\nname = "fuse-maps"\nbefore = "x"\nafter = "y"',
            (
                "[[pass]] {'name': 'fuse-maps', 'before': 'x', 'after': 'y'} needs a name, "
                "may have options, and one of before, after, for."
            ),
        ),
        ("passes = [", "is not TOML: "),
        ('drop = ["fuse-map"]', "No pass 'fuse-map' in this pipeline. Did you mean "),
    ],
)
def test_a_file_that_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PassError) as error:
        read_pipeline(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_command_shows_and_checks_a_pipeline(tmp_path: Path) -> None:
    result = invoke("passes", "default,-drop-idle-maps", "--json")
    names = [p["name"] for p in json.loads(result.stdout)["passes"]]
    assert names == [p.name for p in default_pipeline() if p.name != "drop-idle-maps"]
    result = invoke("passes", "default,-fuse-maps")
    assert result.exit_code == 2
    assert "requires fused, which no pass before it gives. Given by: fuse-maps." in result.stderr
    result = invoke("passes", tmp_path / "none.toml")
    assert "cannot be read" in result.stderr


def test_a_report_with_a_pipeline_and_a_backend() -> None:
    model = "random:gpt2,n_layer=1,n_embd=16,n_head=2,vocab_size=50"
    part = ["--submodule", "h.0.attn", "--heads", "0", "--tokens", "3", "--n-bits", "8"]
    found = {}
    for passes in ("default", "default,-choose-bases"):
        result = invoke(
            "report", model, *part, "--passes", passes, "--backend", "reference", "--json"
        )
        assert result.exit_code == 0, result.stderr
        found[passes] = json.loads(result.stdout)["regions"][0]
    # Without bases of their own, all channels of queries and keys meet.
    assert found["default"]["look_ups"] < found["default,-choose-bases"]["look_ups"]
    assert found["default"]["complexity"] is None  # the reference knows none
    result = invoke("report", model, *part, "--backend", "concret")
    assert result.exit_code == 2
    assert "There is no backend 'concret'. Did you mean 'concrete'?" in result.stderr

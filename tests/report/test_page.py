"""Pages and pictures of programs, opened in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhe_fx.cli import app
from fhe_fx.errors import InputError
from fhe_fx.passes import default_pipeline
from fhe_fx.report.difference import compare_snapshots
from fhe_fx.report.page import LEVELS, Measure, drawing, read_snapshots, to_page, to_svg
from fhe_fx.report.page.layout import layered
from fhe_fx.testing import program_from, seeded

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what lowering a softmax of products wrote."""
    directory = tmp_path_factory.mktemp("dump")
    samples = [(x,) for x in seeded((1, 3, 4))]
    program = program_from(lambda x: (x @ x.mT).softmax(-1) @ x, samples, n_bits=4)
    default_pipeline().dumping(directory).run(program)
    return directory


@pytest.fixture(scope="module")
def snapshots(dump: Path) -> list[dict[str, Any]]:
    return read_snapshots(dump)


def test_each_step_is_dumped_as_text_and_as_data(dump: Path, snapshots: Any) -> None:
    names = [s["pass"] for s in snapshots]
    assert names[:2] == ["given", "normalize"]
    assert names[-1] == "lower-to-integers"
    assert len({s["number"] for s in snapshots}) == len(snapshots)
    (file,) = (dump / "region").glob("*-lower-to-integers.txt")
    text = file.read_text()
    statements = [n["statement"] for n in snapshots[-1]["nodes"]]
    assert all(s in text for s in statements)
    assert sum(n["look_ups"] for n in snapshots[-1]["nodes"]) > 0


# Layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_boxes_do_not_overlap_and_hold_every_node_once(snapshots: Any, level: str) -> None:
    for snapshot in snapshots[1:]:
        drawn = drawing(snapshot, level)
        boxes = drawn["boxes"]
        held = sorted(i for b in boxes for i in b["members"])
        assert held == list(range(len(snapshot["nodes"])))
        for i, a in enumerate(boxes):
            assert 0 <= a["x"] <= a["x"] + a["w"] <= drawn["width"] + 0.2
            assert 0 <= a["y"] <= a["y"] + a["h"] <= drawn["height"] + 0.2
            for b in boxes[:i]:
                apart_x = a["x"] + a["w"] <= b["x"] + 0.2 or b["x"] + b["w"] <= a["x"] + 0.2
                apart_y = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
                assert apart_x or apart_y, (a["lines"], b["lines"])
        assert sum(b["look_ups"] for b in boxes) == sum(n["look_ups"] for n in snapshot["nodes"])


def test_edges_of_nodes_go_down(snapshots: Any) -> None:
    drawn = drawing(snapshots[-1], "nodes")
    for edge in drawn["edges"]:
        numbers = [float(x) for x in re.findall(r"-?[\d.]+", edge["path"])]
        assert numbers[1] < numbers[-1]


def test_an_edge_backwards_is_drawn() -> None:
    layout = layered({"a": (60, 20), "b": (60, 20)}, [("a", "b"), ("b", "a")])
    assert set(layout.paths) == {("a", "b"), ("b", "a")}
    assert layered({}, []).height == 0


def test_modules_fold_to_few_boxes(snapshots: Any) -> None:
    counts = [len(drawing(snapshots[-1], level)["boxes"]) for level in LEVELS]
    assert counts[0] <= counts[1] < counts[2]
    client = [b for b in drawing(snapshots[-1], "modules")["boxes"] if b["kind"] == "client"]
    assert len(client) == 2


# Picture and page -----------------------------------------------------------------------------


def test_the_picture_is_well_formed_and_takes_colours(snapshots: Any) -> None:
    node = next(n for n in snapshots[-1]["nodes"] if n["kind"] == "look-up")
    root = ET.fromstring(to_svg(snapshots[-1], colours={node["name"]: "#123456"}))
    rects = root.findall("{http://www.w3.org/2000/svg}rect")
    assert len(rects) == len(snapshots[-1]["nodes"]) + 2
    assert [r.get("fill") for r in rects].count("#123456") == 1


def test_the_page_loads_nothing_and_cannot_be_broken_out_of(snapshots: Any) -> None:
    evil = json.loads(json.dumps(snapshots[-1]))
    evil["nodes"][0]["statement"] = "</script><script>alert(1)</script>"
    page = to_page([evil], title="<b>mine</b>")
    assert "alert(1)</script>" not in page
    assert "<b>mine" not in page
    assert not re.search(r"""(src|href)\s*=|@import|url\((?!#)|https?://(?!www\.w3\.org)""", page)


def opened(page: Path, fragment: str = "") -> str:
    """Return the page's elements after its script has run; a fault in it would leave them out."""
    run = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
            f"--user-data-dir={page.parent / 'profile'}", "--dump-dom",
            f"{page.as_uri()}#{fragment}",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )  # fmt: skip
    return run.stdout.partition('<script type="application/json"')[0]


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
def test_in_a_browser(snapshots: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    node = next(n for n in snapshots[-1]["nodes"] if n["kind"] == "look-up")
    page.write_text(to_page(snapshots, measures=[Measure("error", {node["name"]: 0.25}, " LSB")]))
    shown = opened(page, f"level=nodes&colour=kind&node={node['name']}")
    assert shown.count("<rect") == len(snapshots[-1]["nodes"]) + 2
    assert shown.count("<li") == len(snapshots)
    assert f"{node['look_ups']} (" in shown
    assert "0.250 LSB" in shown
    assert 'aria-label="table"' in shown
    first = opened(page, "step=1&level=nodes")
    assert first.count("<rect") == len(snapshots[1]["nodes"]) + 2
    assert "after normalize" in first
    assert "0.250 LSB" in opened(page, "level=nodes")  # a measure is what is shown at first


# Command line ---------------------------------------------------------------------------------


def invoke(*args: object, **environment: str) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args], env=environment)


def test_the_command_draws_a_dump_and_a_model(dump: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "g.html", tmp_path / "g.svg"
    result = invoke("graph", dump, "--html", page, "--svg", picture, "--level", "lines")
    assert result.exit_code == 0, result.stderr
    assert page.read_text().startswith("<!doctype html>")
    ET.fromstring(picture.read_text())
    model = "random:gpt2,n_layer=1,n_embd=16,n_head=2,vocab_size=50"
    part = ("--submodule", "h.0.attn", "--heads", "0", "--tokens", "3", "--n-bits", "8")
    dumps = {}
    for name, passes in (("a", "default"), ("b", "default,-choose-bases"), ("c", "default")):
        dumps[name] = tmp_path / name
        result = invoke(
            "graph", model, *part, "--passes", passes, "--html", page, FHE_FX_DUMP=str(dumps[name])
        )
        assert result.exit_code == 0, result.stderr
    same = invoke("diff", dumps["a"], dumps["c"])
    assert (same.exit_code, same.stdout.splitlines()[0][-15:]) == (0, "0 difference(s)")
    other = invoke("diff", dumps["a"], dumps["b"])
    assert other.exit_code == 1
    head, *lines = other.stdout.splitlines()
    assert re.search(r"-> \d+ look-ups of at most [\d> -]+ bits; [1-9]\d* difference", head)
    assert any(line.startswith("+ ") and "lookup(" in line for line in lines)


def test_what_differs_is_said(snapshots: Any) -> None:
    other = json.loads(json.dumps(snapshots[-1]))
    node = next(n for n in other["nodes"] if n["kind"] == "look-up")
    node["table"][3] += 1
    node["rounds_away"] += 2
    found = compare_snapshots(snapshots[-1], other)
    (change,) = found.changes
    old = node["rounds_away"] - 2
    assert str(change) == (f"~ {node['statement']}  # rounds away {old} -> {old + 2}, table")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no dump of a lowering. Make one with FHE_FX_DUMP="),
        ("{", "is not JSON: "),
        ("[]", "is not a snapshot of a program: it is a list, not an object."),
        ('{"pass": "x"}', "is not a snapshot of a program: 'number' is None, not of int."),
    ],
)
def test_what_is_no_dump_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "00-given.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_snapshots(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 3}, "'nodes' is 3, not of list."),
        ({"nodes": [{"a": 1}]}, "node 0: 'name' is None, not of str."),
        ({"nodes": []}, "there is no node 'round_default"),
        ({"notes": None}, "'notes' is None, not of list."),
        ({"results": ["nowhere"]}, "there is no node 'nowhere'."),
    ],
)
def test_an_altered_dump_is_refused(
    snapshots: Any, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "00-given.json").write_text(json.dumps({**snapshots[-1], **change}))
    with pytest.raises(InputError, match=re.escape(f"is not a snapshot of a program: {message}")):
        read_snapshots(tmp_path)


def test_places_are_checked_before_the_work(tmp_path: Path) -> None:
    model = ("no-such-model", "--submodule", "h.0.attn")
    result = invoke("graph", *model, "--html", tmp_path / "none" / "x.html")
    assert result.stderr == (
        f"error: --html {tmp_path}/none/x.html: there is no directory {tmp_path}/none.\n"
    )
    result = invoke("graph", *model, "--svg", tmp_path)
    assert result.stderr == f"error: --svg {tmp_path} is a directory; name a file in it.\n"


def test_nothing_to_write_and_an_unknown_level(dump: Path, tmp_path: Path) -> None:
    result = invoke("graph", dump)
    assert result.stderr == (
        "error: Give what to write: --html out.html, --svg out.svg, or both.\n"
    )
    result = invoke("graph", dump, "--svg", tmp_path / "x.svg", "--level", "node")
    assert result.stderr == "error: --level 'node' is not one of modules, lines, nodes.\n"

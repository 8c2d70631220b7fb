"""All code in the documents runs, page by page, unless the page says why not.

A block behind `<!-- not run: reason -->` is not run; one inside `<!-- setup` ... `-->` is run and
not shown. The blocks of a page run in order, in one namespace, in a folder that has the examples.
To take seconds they lower with few samples, and what would be encrypted is simulated; encryption
has tests of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import fhe_fx
from fhe_fx.cli import app
from fhe_fx.options import Options
from fhe_fx.passes import base
from fhe_fx.passes.lowerings import LOWERINGS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md"))
)
BLOCK = re.compile(
    r"^<!-- not run: (?P<reason>.+?) -->\n+|^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
TUTORIAL = ROOT / "docs" / "writing_a_pass.md"


def python_blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and code of each block that is to run."""
    reason = None
    for found in BLOCK.finditer(page.read_text()):
        line = page.read_text()[: found.start()].count("\n") + 2
        if found["reason"]:
            reason = found["reason"]
            continue
        if found["setup"]:
            yield line, found["setup"]
        elif found["language"] == "python" and reason is None:
            yield line, found["code"]
        reason = None


RUNNING = [p for p in PAGES if any(True for _ in python_blocks(p))]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Lower on little, simulate what would be encrypted, and leave no pass or lowering behind."""
    encrypt: Callable[..., Any] = fhe_fx.encrypt_submodule
    set_mode = fhe_fx.set_mode

    def encrypt_quickly(model: Any, target: Any = None, **choices: Any) -> Any:
        given = choices.pop("options", None) or Options(n_bits=choices.pop("n_bits", 4))
        choices.setdefault("max_tokens", 4)
        is_attention = "attn" in str(target) and "clear_inputs" not in choices
        few = {"heads": [0]} if is_attention else {}
        return encrypt(model, target, options=replace(given, n_samples=8), **{**few, **choices})

    def simulate(model: Any, mode: str) -> None:
        set_mode(model, "simulate" if mode == "execute" else mode)

    monkeypatch.setattr(fhe_fx, "encrypt_submodule", encrypt_quickly)
    monkeypatch.setattr(fhe_fx, "set_mode", simulate)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    registries: list[Any] = [base._REGISTRY, LOWERINGS]
    known = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, known, strict=True):
        registry.clear()
        registry.update(content)


@pytest.mark.parametrize("page", RUNNING, ids=lambda p: str(p.relative_to(ROOT)))
@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_python_runs(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for line, code in python_blocks(page):
        place = Path(f"block_{line}.py")  # dataclasses and passes look for their source
        place.write_text(code)
        sys.modules.setdefault("page", sys.modules[__name__])
        try:
            exec(compile("\n" * line + code, str(page), "exec"), names)
        finally:
            sys.modules.pop("page", None)


def test_what_does_not_run_says_why() -> None:
    for page in PAGES:
        for found in BLOCK.finditer(page.read_text()):
            assert found["reason"] is None or len(found["reason"].split()) >= 3


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every `fhe-fx` command of a page."""
    for found in BLOCK.finditer(page.read_text()):
        if found["language"] not in {"bash", "console"}:
            continue
        for line in found["code"].replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words[:1] == ["fhe-fx"] and "|" not in words:
                yield words[1:]


def test_commands_take_the_options_that_are_written() -> None:
    group: Any = typer.main.get_command(app)
    checked = 0
    for page in PAGES:
        for name, *words in commands(page):
            command = group.commands[name]
            context = command.make_context(name, list(words), resilient_parsing=False)
            assert context.params, f"{page.name}: fhe-fx {name}"
            checked += 1
    assert checked >= 20


# The tutorial ---------------------------------------------------------------------------------


def tutorial() -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return the files of the first section by name, and its commands with what they print."""
    text = TUTORIAL.read_text()
    section = text[text.index("## From an empty folder") : text.index("## A lowering")]
    names = re.findall(r"`([\w.]+\.(?:py|toml))`", section)
    blocks = [m for m in BLOCK.finditer(section) if m["language"] in {"python", "toml"}]
    files = {name: m["code"] for name, m in zip(names, blocks, strict=True)}
    (console,) = (m["code"] for m in BLOCK.finditer(section) if m["language"] == "console")
    steps = [s.partition("\n") for s in re.split(r"^\$ ", console, flags=re.M)[1:]]
    return files, [(command, printed) for command, _, printed in steps]


def matches(printed: str, found: str) -> bool:
    """Compare with what a page shows, in which `...` stands for anything."""
    parts = [re.escape(part.strip()) for part in printed.strip().split("...")]
    return re.fullmatch(r"\s*" + r".*?".join(parts) + r"\s*", found, re.S) is not None


def test_the_tutorial_works_from_an_empty_folder(tmp_path: Path) -> None:
    files, steps = tutorial()
    assert set(files) == {"local_attention.py", "pyproject.toml", "test_local_attention.py"}
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    bin_folder = environment(tmp_path)
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"PATH": f"{bin_folder}:{variables['PATH']}", "PYTHONWARNINGS": "ignore"}
    variables["COLUMNS"] = "200"
    for command, printed in steps:
        done = subprocess.run(
            shlex.split(command),
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert matches(printed, done.stdout), f"{command}\n{done.stdout}"


def environment(home: Path) -> Path:
    """Make an environment that sees the packages of this one, and return its folder of commands."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    folder = home / "venv" / "bin"
    site = next((home / "venv" / "lib").iterdir()) / "site-packages"
    # Installing PyTorch again would take minutes.
    (site / "parent.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    pip = f'exec {sys.executable} -m pip --python {folder / "python"} "$@"'
    for name, line in (("pip", pip), ("fhe-fx", f'exec {folder / "python"} -m fhe_fx "$@"')):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    assert shutil.which("python", path=str(folder))
    return folder

"""Documents: their code compiles, their commands and links exist, and the site has no warning."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fhe_fx.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    p
    for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md"))
    if p.is_file()
)


def blocks(page: Path, language: str) -> Iterator[str]:
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S):
        yield found[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_compiles_and_imports_what_there_is(page: Path) -> None:
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fhe_fx"):
                exec(compile(ast.Module([node], []), str(page), "exec"), {})


def test_commands_exist() -> None:
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    for page in PAGES:
        for code in blocks(page, "bash"):
            for name in re.findall(r"^(?:[A-Z_]+=\S+ )?fhe-fx ([a-z]+)", code, re.M):
                assert name in known, f"{page.name}: fhe-fx {name}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_site_has_no_warning() -> None:
    """Besides, each pass of the page's example is shown with the lines that it changed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "docs" / "site.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (ROOT / "build" / "docs" / "docs" / "passes.md").read_text()
    assert page.count("```diff") >= 10
    api = (ROOT / "build" / "docs" / "docs" / "api.md").read_text()
    assert "### `fhe_fx.encrypt_submodule`" in api

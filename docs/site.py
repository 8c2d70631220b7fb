"""Stages the documentation site: the pages as they are, the passes with what they do to an example,
and the public API from its docstrings.

make site
"""  # noqa: D205

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import itertools

import build  # type: ignore[import-not-found]  # the script beside this one

from fhe_fx.passes import default_pipeline, registered
from fhe_fx.testing import program_from, seeded

ROOT = Path(__file__).parents[1]
STAGE = ROOT / "build" / "docs"
PUBLIC = (
    "fhe_fx",
    "fhe_fx.passes",
    "fhe_fx.extend",
    "fhe_fx.testing",
    "fhe_fx.backends",
    "fhe_fx.plugins",
    "fhe_fx.report.page",
    "fhe_fx.evaluate",
    "fhe_fx.export",
    "fhe_fx.export.onnx",
    "fhe_fx.errors",
)
MOST_LINES = 24


def main() -> None:
    """Write the stage, and build the site of it; a warning is an error."""
    shutil.rmtree(STAGE, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "*.png", "*.svg"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.split():
        (STAGE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, STAGE / name)
    (STAGE / "docs" / "passes.md").write_text(passes())
    (STAGE / "docs" / "operators.md").write_text(build.operators())
    (STAGE / "docs" / "api.md").write_text(api())
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([*command, ROOT / "mkdocs.yml"], check=True, env=quiet)
    print(f"wrote {ROOT / 'build' / 'site' / 'index.html'}")


# Passes ---------------------------------------------------------------------------------------


def attention(x: Tensor) -> Tensor:
    """Compute a small causal attention with its residual: what the pages show the passes on."""
    q, k, v = (x @ w for w in torch.linspace(-1, 1, 48).sin().view(3, 4, 4))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + torch.nn.functional.gelu(mixed * 2) / 3


def passes() -> str:
    """Return the page of passes, each with the lines that it changed in a lowering."""
    changed = dict(changes())
    lines = ["# The passes", "", "The default pipeline, in order:", ""]
    lines += [f"{i}. [`{p.name}`](#{p.name})" for i, p in enumerate(default_pipeline(), 1)]
    lines += ["", "The examples are from one lowering of this function, at 4 bits:", ""]
    lines += ["```python", inspect.getsource(attention).rstrip(), "```"]
    for name, cls in sorted(registered().items()):
        lines += ["", f"## {name}", "", *build._contract(cls)]
        if name in changed:
            lines += ["", "```diff", *changed[name], "```"]
    return "\n".join(lines) + "\n"


def changes() -> Iterator[tuple[str, list[str]]]:
    """Run the pipeline on the example and yield what each pass changed the first time."""
    program = program_from(attention, [(x,) for x in seeded((1, 1, 3, 4))], n_bits=4)
    with tempfile.TemporaryDirectory() as directory:
        default_pipeline().run(program, dump_dir=Path(directory))
        files = sorted(Path(directory).glob("*.json"))
        shots = [json.loads(file.read_text()) for file in files]
    seen: set[str] = set()
    for before, after in itertools.pairwise(shots):
        name = after["pass"].partition("{")[0]
        if name not in seen:
            seen.add(name)
            yield name, _difference(before, after)


def _difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Compare printed statements by operator and operands, whatever their numbers."""

    def text(shot: dict[str, Any]) -> list[str]:
        return [
            f"{n['statement'].partition(' = ')[2]}   {n['type']} {n['bounds']}".rstrip()
            for n in shot["nodes"]
        ]

    ours, theirs = text(before), text(after)
    keys = [[re.sub(r"%\d+", "%", line) for line in side] for side in (ours, theirs)]
    lines: list[str] = []
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, *keys, False).get_opcodes():
        old = [f"- {line}" for line in ours[a0:a1]]
        new = [f"+ {line}" for line in theirs[b0:b1]]
        if tag == "replace" and len(old) == len(new):
            lines += [line for pair in zip(old, new, strict=True) for line in pair]
        elif tag != "equal":
            lines += [*old, *new]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"  ... {len(lines) - MOST_LINES} more lines"]
    return lines


# API ------------------------------------------------------------------------------------------


def api() -> str:
    """Return the page of the public API: what each public module lists in `__all__`."""
    lines = ["# API", ""]
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        lines += ["", f"## `{module_name}`", "", inspect.cleandoc(module.__doc__ or "")]
        for name in module.__all__:
            lines += _entry(module_name, name, getattr(module, name))
    return "\n".join(lines) + "\n"


def _entry(module: str, name: str, value: Any) -> list[str]:
    if inspect.ismodule(value) or not (inspect.isclass(value) or inspect.isfunction(value)):
        return []
    if value.__module__.partition(".")[0] != "fhe_fx":
        return []
    text = inspect.cleandoc(value.__doc__ or "")
    head = ["", f"### `{module}.{name}`", ""]
    return [*head, "```python", _signature(name, value), "```", "", "```text", text, "```"]


def _signature(name: str, value: Any) -> str:
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return name
    return f"{'class ' if inspect.isclass(value) else ''}{name}{text}"


if __name__ == "__main__":
    main()

"""Writes the pages that come from the code: the passes with their laws, and the operators.

make docs
"""

from __future__ import annotations

from pathlib import Path

from fhe_fx.passes import Pass, default_pipeline, registered
from fhe_fx.passes.lowerings import LOWERINGS

DOCS = Path(__file__).parent
NOTE = "<!-- Written by `make docs`; edit the docstrings instead. -->\n"


def main() -> None:
    """Write the pages."""
    (DOCS / "passes.md").write_text(passes())
    (DOCS / "operators.md").write_text(operators())
    print(f"wrote {DOCS / 'passes.md'} and {DOCS / 'operators.md'}")


def passes() -> str:
    """Return the page of passes: the pipeline in order, then the contract of each."""
    lines = [NOTE, "# The passes", "", "The default pipeline, in order:", ""]
    lines += [f"{i}. [`{p.name}`](#{p.name})" for i, p in enumerate(default_pipeline(), 1)]
    for name, cls in sorted(registered().items()):
        lines += ["", f"## {name}", "", *_contract(cls)]
    return "\n".join(lines) + "\n"


def _contract(cls: type[Pass]) -> list[str]:
    import inspect

    module = inspect.getmodule(cls)
    text = inspect.cleandoc(module.__doc__ or "") if module else ""
    rows = [
        f"*{label}*: {', '.join(sorted(names)) or 'nothing'}"
        for label, names in (
            ("requires", cls.requires),
            ("gives", cls.gives),
            ("breaks", cls.breaks),
        )
    ]
    return [text, "", " · ".join(rows)]


def operators() -> str:
    """Return the page of operators that have a lowering."""
    names = sorted({str(op).removesuffix(".default") for op in LOWERINGS})
    return "\n".join(
        [
            NOTE,
            "# Operators that can run encrypted",
            "",
            "Every composite operator that PyTorch decomposes into these is covered too. Add one",
            "with `@fhe_fx.register_lowering` ([writing a pass](writing_a_pass.md)).",
            "",
            *[f"- `{name}`" for name in names],
            "",
        ]
    )


if __name__ == "__main__":
    main()

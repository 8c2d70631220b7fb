"""Imports run one way, Concrete stays in its room, and `import fhe_fx` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fhe_fx"

FOUNDATION = {"errors", "options", "plugins"}
IR = FOUNDATION | {"ir"}
COMPILER = IR | {"quant"}
RULES: dict[str, set[str]] = {
    "errors": set(),
    # What installed packages add is asked for by those who hold a registry.
    "plugins": set(),
    "options": {"errors"},
    # ir and quant are what passes and backends have in common.
    "ir": FOUNDATION,
    "quant": IR,
    "capture": IR,
    "passes": COMPILER,
    "backends": COMPILER,
    # The runtime holds a pipeline to prove causality and advise on bits, and runs the reference.
    "runtime": COMPILER | {"passes", "backends"},
    "report": COMPILER | {"backends"},
    "export": COMPILER | {"capture", "passes", "backends", "runtime", "report"},
    # api puts the rooms together: what it makes knows how to be saved.
    "api": COMPILER | {"capture", "passes", "backends", "runtime", "report", "export"},
    "extend": COMPILER | {"capture", "passes"},
    "testing": COMPILER | {"capture", "passes", "report", "extend"},
    "evaluate": COMPILER | {"capture", "passes", "backends", "runtime", "report", "api"},
    "inspection": COMPILER | {"passes", "backends", "runtime", "report"},
    # client and server: bundles come from export, stand-ins from the runtime.
    "serving": FOUNDATION | {"backends", "runtime", "export"},
    "cli": COMPILER
    | {"capture", "passes", "backends", "runtime", "report", "api", "export", "evaluate", "serving"}
    | {"inspection", "__init__", "extend"},
    "__init__": COMPILER | {"api", "export", "inspection", "passes", "serving"},
    "__main__": {"cli"},
}
"""What each room may import of the package, besides itself."""

LAZY_ONLY = {
    "fhe_fx.backends.concrete": {"runtime", "report", "export", "cli", "serving", "backends"}
}
"""Modules that may be imported inside functions only, and by these rooms."""


@dataclass(frozen=True)
class Import:
    """One import statement of one source file."""

    file: Path
    line: int
    module: str
    is_lazy: bool
    is_for_types: bool

    @property
    def room(self) -> str:
        return self.file.relative_to(PACKAGE).parts[0].removesuffix(".py")

    @property
    def imported_room(self) -> str:
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 else "__init__"

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.line} imports {self.module}"


def _imports(file: Path) -> Iterator[Import]:
    def visit(node: ast.AST, is_lazy: bool, is_for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for name in child.names:
                    yield Import(file, child.lineno, name.name, is_lazy, is_for_types)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno} imports relatively"
                module = child.module or ""
                if module == "fhe_fx":  # `from fhe_fx import passes` imports a room
                    for name in child.names:
                        is_room = (PACKAGE / name.name).is_dir() or (
                            PACKAGE / f"{name.name}.py"
                        ).is_file()
                        full = f"fhe_fx.{name.name}" if is_room else module
                        yield Import(file, child.lineno, full, is_lazy, is_for_types)
                else:
                    yield Import(file, child.lineno, module, is_lazy, is_for_types)
            else:
                is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, is_lazy or is_function, is_for_types or is_typing)

    yield from visit(ast.parse(file.read_text()), False, False)


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [i for file in FILES for i in _imports(file)]
OWN = [i for i in IMPORTS if i.module.split(".")[0] == "fhe_fx"]


def _listed(found: list[Import]) -> str:
    return "\n".join(str(i) for i in found)


def test_every_room_has_a_rule() -> None:
    rooms = {f.relative_to(PACKAGE).parts[0].removesuffix(".py") for f in FILES}
    assert rooms <= set(RULES), rooms - set(RULES)


def test_the_rules_run_one_way() -> None:
    def reaches(room: str, seen: frozenset[str] = frozenset()) -> set[str]:
        assert room not in seen, f"{room} reaches itself"
        return RULES[room].union(*(reaches(r, seen | {room}) for r in RULES[room]))

    for room in RULES:
        assert room not in reaches(room)
    assert "backends" not in reaches("passes")
    assert "passes" not in reaches("backends")
    assert reaches("ir") == FOUNDATION
    assert reaches("quant") == IR


def test_imports_follow_the_rules() -> None:
    wrong = [i for i in OWN if i.imported_room != i.room and i.imported_room not in RULES[i.room]]
    assert not wrong, _listed(wrong)


def test_only_its_backend_imports_concrete() -> None:
    room = PACKAGE / "backends" / "concrete"
    wrong = [
        i for i in IMPORTS if i.module.split(".")[0] == "concrete" and room not in i.file.parents
    ]
    assert not wrong, _listed(wrong)


def test_only_serving_imports_the_web() -> None:
    web = {"fastapi", "starlette", "uvicorn", "prometheus_client", "httpx", "zstandard"}
    wrong = [i for i in IMPORTS if i.module.split(".")[0] in web and i.room != "serving"]
    assert not wrong, _listed(wrong)
    early = [i for i in OWN if i.imported_room == "serving" and i.room != "serving"]
    early = [i for i in early if not (i.is_lazy or i.is_for_types)]
    assert not early, _listed(early)


def test_only_onnx_export_imports_onnx() -> None:
    room = PACKAGE / "export" / "onnx"
    onnx = {"onnx", "onnxruntime", "onnxscript"}
    wrong = [i for i in IMPORTS if i.module.split(".")[0] in onnx and room not in i.file.parents]
    assert not wrong, _listed(wrong)
    early = [i for i in OWN if i.module.startswith("fhe_fx.export.onnx")]
    early = [i for i in early if room not in i.file.parents and not i.is_lazy]
    assert not early, _listed(early)


def test_the_concrete_backend_is_imported_late() -> None:
    for module, rooms in LAZY_ONLY.items():
        room = PACKAGE.joinpath(*module.split(".")[1:])
        users = [i for i in OWN if i.module.startswith(module) and room not in i.file.parents]
        early = [i for i in users if not (i.is_lazy or i.is_for_types) or i.room not in rooms]
        assert not early, _listed(early)


def test_type_checking_is_no_way_around() -> None:
    hidden = [i for i in OWN if i.is_for_types and i.imported_room not in RULES[i.room] | {i.room}]
    assert not hidden, _listed(hidden)


def _seconds(statement: str) -> float:
    """Return the least processor time of three imports in processes of their own."""
    code = f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
    return min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    )


def test_import_leaves_heavy_packages_alone() -> None:
    heavy = ["concrete", "transformers", "typer", "rich", "matplotlib", "onnx", "onnxruntime"]
    heavy += ["scipy.stats", "networkx"]
    heavy += [
        "fastapi",
        "uvicorn",
        "httpx",
        "zstandard",
        "cryptography",
        "prometheus_client",
        "pkg_resources",
    ]
    code = f"import fhe_fx, sys; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert run.stdout.decode().strip() == "[]"


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({missing}))  # None: importing it fails
{statement}
"""
SERVER_ONLY = ["fastapi", "starlette", "uvicorn", "prometheus_client"]
CLIENT_ONLY = ["httpx", "cryptography"]


def _without(missing: list[str], statement: str) -> str:
    code = WITHOUT.format(missing=missing, statement=statement)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, timeout=60
    )
    return run.stderr.decode()


def test_each_party_needs_its_own_extra_alone() -> None:
    assert not _without(SERVER_ONLY, "import fhe_fx; fhe_fx.connect")
    server = "import fhe_fx.serving.server, fhe_fx.serving.worker"
    assert not _without(CLIENT_ONLY, server)
    assert "fhe_fx.connect needs httpx: pip install 'fhe_fx[client]'" in _without(
        CLIENT_ONLY, "import fhe_fx; fhe_fx.connect"
    )
    serve = "from fhe_fx.cli import app; app(['serve', 'none'])"
    missing = _without(["onnx"], "import fhe_fx.export.onnx")
    assert "fhe_fx.export.onnx needs onnx: pip install 'fhe_fx[onnx]'" in missing
    export = "from fhe_fx.cli import app; app(['export', 'm', '--onnx', 'none'])"
    missing = _without(["onnxruntime"], export)
    assert missing == "error: This needs onnxruntime: pip install 'fhe_fx[onnx]'\n", missing
    message = _without(SERVER_ONLY, serve)
    assert message == "error: This needs uvicorn: pip install 'fhe_fx[server]'\n", message


def test_import_takes_less_than_a_second_beyond_torch() -> None:
    assert _seconds("import torch, fhe_fx") - _seconds("import torch") < 1.0

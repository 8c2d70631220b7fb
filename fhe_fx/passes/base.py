"""The contract of a pass, the registry of passes, and the pipeline that runs them.

A pass is a frozen dataclass: its fields are its options. It declares the properties that it
`requires`, `gives` and `breaks`; a pipeline checks them all before it runs anything, never sorts,
and after each pass verifies the graph and that the pass told the truth about having changed it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from fhe_fx import plugins
from fhe_fx.errors import FheFxError, InvariantError, PassError, did_you_mean
from fhe_fx.ir.program import Program
from fhe_fx.ir.snapshot import snapshot
from fhe_fx.ir.verify import verify
from fhe_fx.passes.guard import Held, failure, is_foreign
from fhe_fx.passes.lowerings.registry import load_lowerings

__all__ = ["Pass", "PassRecord", "Pipeline", "get_pass", "register", "registered"]


@dataclass(frozen=True)
class Pass:
    """A rewrite of a program, or an analysis of it."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    is_exact: ClassVar[bool] = True
    """Whether the float program computes the same after it, up to float rounding. The docstring of
    a pass that is not exact states what it changes, and why the result is the better for it."""

    def run(self, program: Program) -> bool:
        """Apply the pass in place.

        Returns:
            True if the printed program changed, or a constant that the print does not show whole.
        """
        raise NotImplementedError

    def text(self) -> str:
        """Return the name, and in braces the options that differ from their defaults."""
        given = [
            f"{f.name}={json.dumps(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}{{{','.join(given)}}}" if given else self.name

    @classmethod
    def law(cls) -> str:
        """Return what the pass does and what it preserves, from the docstring of its file.

        The first paragraph says the one, the first sentence of the second the other.
        """
        import inspect

        module = inspect.getmodule(cls)
        text = (module.__doc__ if module and module.__doc__ else cls.__doc__) or ""
        does, *more = (" ".join(part.split()) for part in text.strip().split("\n\n"))
        preserves = re.match(r".+?[.;](?=\s|$)", more[0]) if more else None
        return f"{does} {preserves[0].rstrip(';.')}." if preserves else does


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_REGISTRY: dict[str, type[Pass]] = plugins.registry({})
REGISTRATION_CHECKS: list[Callable[[type[Pass]], None]] = []
"""What `register` does besides, in tests: see `fhe_fx.testing.laws_at_registration`."""
P = TypeVar("P", bound=type[Pass])


def register(cls: P) -> P:
    """Make a pass known by its name.

    Raises:
        PassError: if the name is taken, or no name, or the class is not a frozen dataclass of its
            own with a `run`.
    """
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise PassError(f"{cls!r} is not a pass. Derive a class from fhe_fx.passes.Pass.")
    made = vars(cls).get("__dataclass_params__")
    if made is None or not made.frozen:
        is_none = "not a dataclass" if made is None else "not frozen"
        raise PassError(f"{cls.__name__} is {is_none}. Put @dataclass(frozen=True) on it.")
    if not isinstance(getattr(cls, "name", None), str):
        raise PassError(f"{cls.__name__} has no name. Set name: ClassVar[str].")
    if not _NAME.fullmatch(cls.name):
        raise PassError(
            f"{cls.__name__} has the name {cls.name!r}; a pipeline's text needs letters, digits, "
            f"'-', '_' and '.' alone, as in 'cheaper-softmax'."
        )
    known = _REGISTRY.get(cls.name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PassError(f"A pass named {cls.name!r} exists: {known.__qualname__}.")
    for listed in ("requires", "gives", "breaks"):
        if not isinstance(found := getattr(cls, listed), (set, frozenset)):
            raise PassError(
                f"{cls.__name__}.{listed} is {found!r}; give a frozenset of properties."
            )
    if cls.run is Pass.run:
        raise PassError(f"{cls.__name__} has no run(self, program).")
    for check in REGISTRATION_CHECKS:
        check(cls)
    _REGISTRY[cls.name] = cls
    return cls


def registered() -> dict[str, type[Pass]]:
    """Return every known pass by name; installed packages add theirs by entry point."""
    plugins.load(plugins.PASSES, register)
    return dict(_REGISTRY)


def get_pass(name: str) -> type[Pass]:
    """Return a pass by name.

    Raises:
        PassError: if there is none; close names are suggested.
    """
    known = registered()
    if name not in known:
        for fault in plugins.faults(plugins.PASSES):
            if fault.plugin.name == name:
                raise PassError(f"There is no pass {name!r}. {fault}")
        raise PassError(f"There is no pass {name!r}.{did_you_mean(name, list(known))}")
    return known[name]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did in one run."""

    name: str
    seconds: float
    has_changed: bool
    n_nodes: int


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes, as a value: each edit returns a new pipeline."""

    passes: tuple[Pass, ...] = field(default_factory=tuple)
    dump_dir: Path | None = field(default=None, compare=False)
    """Where a directory for each program is written with its print after each pass."""

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __str__(self) -> str:
        """List the passes, with the options that differ from their defaults."""
        return ",".join(p.text() for p in self.passes)

    def _index(self, name: str) -> int:
        names = [p.name for p in self.passes]
        known = list(dict.fromkeys(names))
        if name not in known:
            raise PassError(f"No pass {name!r} in this pipeline.{did_you_mean(name, known)}")
        return names.index(name)

    def insert_before(self, name: str, *new: Pass) -> Pipeline:
        """Return a pipeline with `new` before the first pass called `name`."""
        i = self._index(name)
        return self._of(*self.passes[:i], *new, *self.passes[i:])

    def _of(self, *passes: Pass) -> Pipeline:
        return dataclasses.replace(self, passes=passes)

    def dumping(self, directory: Path | None) -> Pipeline:
        """Return a pipeline that writes its dumps to a directory for each program in this one."""
        return self if directory == self.dump_dir else dataclasses.replace(self, dump_dir=directory)

    def insert_after(self, name: str, *new: Pass) -> Pipeline:
        """Return a pipeline with `new` after the last pass called `name`."""
        self._index(name)
        i = max(i for i, p in enumerate(self.passes) if p.name == name) + 1
        return self._of(*self.passes[:i], *new, *self.passes[i:])

    def replace(self, name: str, new: Pass) -> Pipeline:
        """Return a pipeline in which every pass called `name` is `new`."""
        self._index(name)
        return self._of(*(new if p.name == name else p for p in self.passes))

    def drop(self, name: str) -> Pipeline:
        """Return a pipeline without the passes called `name`."""
        self._index(name)
        return self._of(*(p for p in self.passes if p.name != name))

    def check(self, properties: frozenset[str] = frozenset({"captured"})) -> None:
        """Check that each pass finds the properties that it requires.

        Raises:
            PassError: names the first pass that does not, and who could give what is missing.
        """
        held = set(properties)
        for number, p in enumerate(self.passes):
            if missing := sorted(p.requires - held):
                givers = sorted(n for n, c in registered().items() if c.gives & set(missing))
                raise PassError(
                    f"Pass {number + 1}, {p.name}, requires {', '.join(missing)}, which no pass "
                    f"before it gives. Given by: {', '.join(givers) or 'no registered pass'}."
                )
            held = (held - p.breaks) | p.gives

    def run(
        self,
        program: Program,
        *,
        dump_dir: Path | None = None,
        on_pass: Callable[[PassRecord], None] | None = None,
    ) -> list[PassRecord]:
        """Run every pass in order, verifying the program after each.

        Args:
            program: rewritten in place.
            dump_dir: where `07-fuse-maps.txt` is written for each pass that changed something,
                and the same as data in `07-fuse-maps.json`, for `fhe-fx graph` and `diff`.
            on_pass: called after each pass.

        Raises:
            PassError: names the pass, those before it, and the printed lines at fault.
        """
        self.check(frozenset(program.properties))
        load_lowerings()
        records: list[PassRecord] = []
        text = str(program)
        if dump_dir is None and self.dump_dir is not None:
            dump_dir = self.dump_dir / re.sub(r"[^\w.-]+", "-", program.name)
        if dump_dir is not None:
            _start_dumps(dump_dir, program)
        noted = len(program.notes)
        for number, p in enumerate(self.passes):
            start, held = time.perf_counter(), Held(p, program, text)
            try:
                said = p.run(program)
                held.check_graph(program)
                program.clean()
                program.properties = (program.properties - p.breaks) | p.gives
                verify(program)
            except (PassError, InvariantError) as error:
                raise failure(p, [r.name for r in records], error) from error
            except (Exception, SystemExit) as error:  # whatever foreign code does
                if isinstance(error, FheFxError) and not is_foreign(p):
                    raise
                raise failure(p, [r.name for r in records], error) from error
            text = held.check_answer(said, program)
            try:
                held.check_meaning(program)
            except Exception as error:
                raise failure(p, [r.name for r in records], error) from error
            if said and dump_dir is not None:
                _dump(dump_dir, number + 1, p.text(), program, noted)
                noted = len(program.notes)
            records.append(
                PassRecord(p.name, time.perf_counter() - start, said, len(program.graph.nodes))
            )
            if on_pass is not None:
                on_pass(records[-1])
        return records


def _start_dumps(directory: Path, program: Program) -> None:
    """Remove what an earlier run wrote, and write the program as it is given."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        if re.fullmatch(r"\d\d+-[\w.-]+\.(txt|json)", old.name):
            old.unlink()
    _dump(directory, 0, "given", program, len(program.notes))


def _dump(directory: Path, number: int, text: str, program: Program, noted: int) -> None:
    """Write the program as text and as data, with what was noted since the last time."""
    stem = directory / f"{number:02d}-{text.partition('{')[0]}"
    notes = [dataclasses.asdict(note) for note in program.notes[noted:]]
    data = {"pass": text, "number": number, "notes": notes, **snapshot(program)}
    stem.with_name(f"{stem.name}.txt").write_text(f"{program}\n", encoding="utf-8")
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(data), encoding="utf-8")

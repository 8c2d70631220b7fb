"""The contract of a pass, the registry of passes, and the pipeline that runs them.

A pass is a frozen dataclass: its fields are its options. It declares the properties that it
`requires`, `gives` and `breaks`; a pipeline checks them all before it runs anything, never sorts,
and after each pass verifies the graph and that the pass told the truth about having changed it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fhe_fx import plugins
from fhe_fx.errors import FheFxError, PassError, did_you_mean
from fhe_fx.ir import dialect as d
from fhe_fx.ir.equivalence import first_difference
from fhe_fx.ir.printer import format_node, format_program
from fhe_fx.ir.program import Program
from fhe_fx.ir.snapshot import snapshot
from fhe_fx.ir.verify import verify
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


_REGISTRY: dict[str, type[Pass]] = {}
REGISTRATION_CHECKS: list[Callable[[type[Pass]], None]] = []
"""What `register` does besides, in tests: see `fhe_fx.testing.laws_at_registration`."""
P = TypeVar("P", bound=type[Pass])


def register(cls: P) -> P:
    """Make a pass known by its name.

    Raises:
        PassError: if the name is taken, or the class is not a dataclass of its own.
    """
    if "__dataclass_params__" not in vars(cls):
        raise PassError(f"{cls.__name__} is not a dataclass. Put @dataclass(frozen=True) on it.")
    if not isinstance(getattr(cls, "name", None), str):
        raise PassError(f"{cls.__name__} has no name. Set name: ClassVar[str].")
    known = _REGISTRY.get(cls.name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PassError(f"A pass named {cls.name!r} exists: {known.__qualname__}.")
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
            start, constants = time.perf_counter(), _constants(program)
            given = _copy(program) if p.is_exact and _is_foreign(p) else None
            try:
                said = p.run(program)
                program.clean()
                program.properties = (program.properties - p.breaks) | p.gives
                verify(program)
            except FheFxError as error:
                if not isinstance(error, PassError) and type(error).__name__ != "InvariantError":
                    raise
                raise self._failure(p, records, error) from error
            except Exception as error:
                raise self._failure(p, records, error) from error
            after = str(program)
            has_changed = after != text or (said and not _same(constants, _constants(program)))
            if said != has_changed:
                raise PassError(
                    f"{_named(p)} returned {said}, but the printed program "
                    f"{'changed' if after != text else 'did not change'}"
                    f"{_first_change(text, after, program)}"
                )
            if given is not None:
                self._check_meaning(p, records, given, program)
            text = after
            if said and dump_dir is not None:
                _dump(dump_dir, number + 1, p.text(), program, noted)
                noted = len(program.notes)
            records.append(
                PassRecord(p.name, time.perf_counter() - start, said, len(program.graph.nodes))
            )
            if on_pass is not None:
                on_pass(records[-1])
        return records

    def _check_meaning(
        self, p: Pass, done: list[PassRecord], before: Program, after: Program
    ) -> None:
        """Run the graph before and after a pass that is not ours, and states that it is exact."""
        found = first_difference(before, after, after.samples[:CHECKED_SAMPLES])
        if found is not None:
            error = PassError(
                f"the graph no longer computes the same: {found}\n  If that is meant, set "
                f"is_exact = False and let the docstring say what changes"
            )
            raise self._failure(p, done, error)

    @staticmethod
    def _failure(p: Pass, done: list[PassRecord], error: Exception) -> PassError:
        node = getattr(error, "node", None)
        where = ""
        if node is not None:
            where = f"\n  at {node.name}, {node.meta.get('module_path', '')}"
        before = ", ".join(r.name for r in done) or "none"
        options = ", ".join(f"{f.name}={getattr(p, f.name)!r}" for f in dataclasses.fields(p))
        plugin = plugins.provider(type(p))
        whose = f" of {plugin}" if plugin else ""
        return PassError(
            f"Pass {p.name}({options}){whose} failed: {error}{where}\n  passes before it: {before}"
        )


def _constants(program: Program) -> list[Tensor]:
    return [d.constant(n) for n in program.graph.nodes if n.op == "get_attr"]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Say whether constants are equal; the print gives only kind and shape of large ones."""
    return len(before) == len(after) and all(
        a is b or (a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(before, after, strict=True)
    )


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


CHECKED_SAMPLES = 2
"""Calibration samples on which a pass that is not ours is compared with the graph before it."""


def _is_foreign(p: Pass) -> bool:
    return not type(p).__module__.startswith("fhe_fx.")


def _copy(program: Program) -> Program:
    """Copy what is needed to run a program later as it is now."""
    return Program(
        copy.deepcopy(program.module),
        name=program.name,
        options=program.options,
        properties=set(program.properties),
        sources=dict(program.sources),
    )


def _named(p: Pass) -> str:
    plugin = plugins.provider(type(p))
    return f"{p.name} of {plugin}" if plugin else p.name


def _first_change(before: str, after: str, program: Program) -> str:
    """Name the first node whose printed line changed, and quote it as it was and as it is."""
    lines = zip_longest(before.split("\n"), after.split("\n"), fillvalue="  (nothing)")
    for a, b in lines:
        if a != b:
            printed_as = {n.name: format_node(n)[0] for n in program.encrypted()}
            named = [n for n, text in printed_as.items() if b.strip().startswith(text)]
            where = f", first at node {named[0]}" if named else ""
            return f"{where}.\n  before:{a}\n  after: {b}"
    return "."


def printed(program: Program, node: object) -> str:
    """Return the printed lines around one node, for messages."""
    return format_program(program, {node})  # type: ignore[arg-type]

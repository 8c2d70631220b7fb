"""Plugins that fail are named, once, and leave everything else as it was."""

from __future__ import annotations

import copy
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from fhe_fx import plugins
from fhe_fx.backends import backend_names, facts_by, get_backend, register_backend
from fhe_fx.backends import registry as backend_registry
from fhe_fx.errors import BackendError, PassError
from fhe_fx.ir import Program
from fhe_fx.passes import Pass, Pipeline, base, get_pass, registered
from fhe_fx.passes.hoist_maps import HoistMaps
from fhe_fx.passes.lowerings import LOWERINGS, register_lowering
from fhe_fx.passes.lowerings.registry import is_inexact, load_lowerings
from tests.passes.test_base import small

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Pretend that packages are installed; afterwards nothing of them is left."""
    held: list[Any] = [base._REGISTRY, LOWERINGS, backend_registry._MAKERS]
    held += [plugins._providers, plugins._tried]
    known, faults = [copy.copy(h) for h in held], list(plugins._faults)
    entries: list[importlib.metadata.EntryPoint] = []
    modules: list[str] = []

    class Distribution(importlib.metadata.Distribution):
        version = "1.2"

        def __init__(self, name: str) -> None:
            self._name = name

        @property
        def name(self) -> str:
            return self._name

        def read_text(self, filename: str) -> str | None:
            return None

        def locate_file(self, path: Any) -> Any:
            raise NotImplementedError

    def add(group: str, name: str, package: str, execute: Callable[[Any], None]) -> None:
        """Offer `package:found` under a name; `execute` runs when the module is imported."""

        class Loader:
            def create_module(self, spec: Any) -> None:
                return None

            def exec_module(self, module: Any) -> None:
                execute(module)

        class Finder:
            def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
                if fullname == package:
                    return importlib.machinery.ModuleSpec(package, Loader())  # type: ignore[arg-type]
                return None

        monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
        value = package if group == plugins.LOWERINGS else f"{package}:found"
        entry = importlib.metadata.EntryPoint(name, value, group)
        entries.append(entry._for(Distribution(package.replace("_", "-"))))  # type: ignore[attr-defined]
        modules.append(package)

    monkeypatch.setattr(
        plugins, "_entries", lambda group: tuple(e for e in entries if e.group == group)
    )
    yield add
    for registry, content in zip(held, known, strict=True):
        registry.clear()
        registry.update(content)
    plugins._faults[:] = faults
    for name in modules:
        sys.modules.pop(name, None)


def offers(found: Any) -> Callable[[types.ModuleType], None]:
    def execute(module: types.ModuleType) -> None:
        module.found = found  # type: ignore[attr-defined]

    return execute


def fails(module: types.ModuleType) -> None:
    raise ImportError("no module named triton")


@dataclass(frozen=True)
class Shifts(Pass):
    """Adds one to what the graph computes, and says nothing of it."""

    name: ClassVar[str] = "shifts"
    amount: float = 1.0

    def run(self, program: Program) -> bool:
        (result,) = program.results
        b = program.before(program.output_node, self, origin=result)
        program.output_node.args = ((b.shift(result, self.amount),),)
        return True


@dataclass(frozen=True)
class Denies(Shifts):
    name: ClassVar[str] = "denies"

    def run(self, program: Program) -> bool:
        super().run(program)
        return False


@dataclass(frozen=True)
class Admits(Shifts):
    name: ClassVar[str] = "admits"
    is_exact: ClassVar[bool] = False


@dataclass(frozen=True)
class Breaks(Pass):
    name: ClassVar[str] = "breaks"

    def run(self, program: Program) -> bool:
        program.results[0].meta["val"] = torch.empty(7, device="meta")
        return True


# Discovery ------------------------------------------------------------------------------------


def test_one_that_cannot_be_imported_is_named_and_the_others_work(install: Install) -> None:
    install(plugins.PASSES, "broken", "bad_package", fails)
    install(plugins.PASSES, "shifts", "good_package", offers(Shifts))
    message = (
        "The plugin bad-package 1.2 is left out: its entry point 'broken' of fhe_fx.passes failed. "
        "ImportError: no module named triton"
    )
    with pytest.warns(UserWarning, match="is left out") as told:
        found = registered()
    assert [str(w.message) for w in told] == [message]
    assert found["shifts"] is Shifts
    assert "broken" not in found
    assert found["hoist-maps"] is HoistMaps
    registered()  # reported once; a second warning would be an error here
    with pytest.raises(PassError) as error:
        get_pass("broken")
    assert str(error.value) == f"There is no pass 'broken'. {message}"


def test_one_that_ends_the_process_is_named_too(install: Install) -> None:
    install(plugins.PASSES, "leaves", "bad_package", lambda module: sys.exit("no licence"))
    install(plugins.PASSES, "shifts", "good_package", offers(Shifts))
    with pytest.warns(UserWarning, match="bad-package 1.2 is left out: .* SystemExit: no licence"):
        assert registered()["shifts"] is Shifts


def test_a_name_that_is_taken_is_refused_even_for_a_class_of_the_same_name(
    install: Install,
) -> None:
    namesake: Any = dataclass(frozen=True)(
        type("HoistMaps", (Pass,), {"name": "hoist-maps", "__module__": "bad_package"})
    )
    install(plugins.PASSES, "hoist-maps", "bad_package", offers(namesake))
    with pytest.warns(UserWarning, match="PassError: A pass named 'hoist-maps' exists: HoistMaps"):
        registered()
    assert get_pass("hoist-maps") is HoistMaps


def test_a_pass_that_its_module_registered_goes_with_it(install: Install) -> None:
    def half(module: Any) -> None:
        base.register(Shifts)
        register_lowering(torch.ops.aten.special_i0.default, is_exact=False)(mine)
        register_backend(Free)
        fails(module)

    def mine(b: Any, x: Any) -> Any:
        return x

    install(plugins.PASSES, "half", "bad_package", half)
    install(plugins.PASSES, "denies", "good_package", offers(Denies))
    with pytest.warns(UserWarning, match="bad-package 1.2 is left out"):
        found = registered()
    assert "shifts" not in found
    assert found["denies"] is Denies
    assert torch.ops.aten.special_i0.default not in LOWERINGS
    assert not is_inexact(mine)
    assert "free" not in backend_names()


def test_what_a_plugin_loads_before_it_fails_stays(install: Install) -> None:
    def asks(module: Any) -> None:
        base.register(Shifts)
        assert get_pass("denies") is Denies
        fails(module)

    install(plugins.PASSES, "asks", "bad_package", asks)
    install(plugins.PASSES, "denies", "good_package", offers(Denies))
    with pytest.warns(UserWarning, match="bad-package 1.2 is left out"):
        found = registered()
    assert found["denies"] is Denies
    assert "shifts" not in found
    assert str(plugins.provider(Denies)) == "good-package 1.2"


def test_entry_points_that_name_something_else(install: Install) -> None:
    install(plugins.PASSES, "number", "bad_package", offers(7))
    install(plugins.PASSES, "nothing", "bad_package_2", lambda module: None)
    with pytest.warns(UserWarning, match="is left out") as told:
        registered()
    assert [str(w.message).partition("failed. ")[2] for w in told] == [
        "PassError: 7 is not a pass. Derive a class from fhe_fx.passes.Pass.",
        "AttributeError: module 'bad_package_2' has no attribute 'found'",
    ]


def test_lowerings_that_fail_half_way_leave_nothing(install: Install) -> None:
    ops = torch.ops.aten

    def half(module: Any) -> None:
        register_lowering(ops.asinh.default)(lambda b, x: b.apply(x, ops.asinh.default))
        fails(module)

    def whole(module: Any) -> None:
        register_lowering(ops.acosh.default)(lambda b, x: b.apply(x, ops.acosh.default))

    before = dict(LOWERINGS)
    assert ops.special_zeta.default not in before
    for op in (ops.asinh.default, ops.acosh.default):
        LOWERINGS.pop(op, None)
    install(plugins.LOWERINGS, "half", "bad_package", half)
    install(plugins.LOWERINGS, "whole", "good_package", whole)
    with pytest.warns(UserWarning, match="bad-package 1.2 is left out"):
        load_lowerings()
    assert ops.asinh.default not in LOWERINGS
    assert ops.acosh.default in LOWERINGS


def test_a_second_lowering_must_say_that_it_replaces(install: Install) -> None:
    op = torch.ops.aten.tanh.default

    def mine(b: Any, x: Any) -> Any:
        return b.apply(x, op)

    known = LOWERINGS[op]
    with pytest.raises(PassError, match=r"^aten.tanh.default has a lowering: fhe_fx\.passes\."):
        register_lowering(op)(mine)
    assert LOWERINGS[op] is known
    register_lowering(op, replace=True)(mine)
    assert LOWERINGS[op] is mine


class Free:
    name = "free"

    def compile(self, program: Program) -> Any:
        return None


def test_backends_by_name(install: Install) -> None:
    install(plugins.BACKENDS, "free", "good_package", offers(Free))
    install(plugins.BACKENDS, "gpu", "bad_package", fails)
    with pytest.warns(UserWarning, match="bad-package 1.2 is left out"):
        assert backend_names() == ["concrete", "free", "reference"]
    assert isinstance(get_backend("free"), Free)
    assert get_backend("reference").name == "reference"
    with pytest.raises(BackendError, match=r"^There is no backend 'gpu'\. The plugin bad-package"):
        get_backend("gpu")
    with pytest.raises(BackendError) as error:
        get_backend("referenc")
    assert str(error.value) == "There is no backend 'referenc'. Did you mean 'reference' or 'free'?"


def test_a_backend_of_a_taken_name_and_one_that_is_none(install: Install) -> None:
    class Other:
        name = "reference"

        def compile(self, program: Program) -> Any:
            return None

    with pytest.raises(BackendError, match=r"^A backend named 'reference' exists: fhe_fx\."):
        register_backend(Other)
    with pytest.raises(
        BackendError, match="is not a backend: it needs a name and a method compile"
    ):
        register_backend(int)


class Costs(Free):
    """Offers what a test wants it to."""

    circuit: Any = None

    def compile(self, program: Program) -> Any:
        if isinstance(self.circuit, BaseException):
            raise self.circuit
        return self.circuit


def test_a_backend_that_fails_is_named(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(plugins.BACKENDS, "free", "good_package", offers(Costs))
    begin, facts = "The backend 'free' of good-package 1.2", types.SimpleNamespace
    asked = "a circuit's facts are fhe_fx.backends.CircuitFacts, or None."
    for circuit, message in (
        (ZeroDivisionError("by zero"), f"{begin} failed on region: ZeroDivisionError: by zero"),
        (SystemExit("no licence"), f"{begin} failed on region: SystemExit: no licence"),
        (
            None,
            f"{begin} failed on region: AttributeError: 'NoneType' object has no attribute 'facts'",
        ),
        (
            facts(facts={"look_ups": 3}),
            f"{begin} says what region costs by a dict; {asked}",
        ),
        (BackendError("too wide"), "too wide"),
    ):
        monkeypatch.setattr(Costs, "circuit", circuit)
        with pytest.raises(BackendError) as error:
            facts_by("free", small())
        assert str(error.value) == message
    monkeypatch.setattr(Costs, "circuit", facts(facts=None))
    assert facts_by("free", small()) is None
    monkeypatch.setattr(Costs, "__init__", lambda self, device: None)
    with pytest.raises(BackendError, match=rf"^{begin} cannot be made: TypeError: "):
        get_backend("free")


# Running --------------------------------------------------------------------------------------


def run(install: Install, cls: type[Pass]) -> str:
    """Run a plugin's pass behind one of ours, and return what is said."""
    install(plugins.PASSES, cls.name, "good_package", offers(cls))
    with pytest.raises(PassError) as error:
        Pipeline((HoistMaps(), get_pass(cls.name)())).run(small())
    return str(error.value)


def test_one_that_changes_what_the_graph_computes(install: Install) -> None:
    message = run(install, Shifts)
    first, *rest = message.split("\n")
    assert first == (
        "Pass shifts(amount=1.0) of good-package 1.2 failed: the graph no longer computes the "
        "same: result 0, node shift_default, differs by 1, values up to 2.72"
    )
    assert any("shift(%3, 1)" in line for line in rest)
    assert "^^^^" in message
    assert message.endswith("passes before it: hoist-maps")


def test_one_that_says_so_may(install: Install) -> None:
    install(plugins.PASSES, "admits", "good_package", offers(Admits))
    records = Pipeline((get_pass("admits")(),)).run(small())
    assert [r.has_changed for r in records] == [True]


def test_one_that_denies_a_change(install: Install) -> None:
    message = run(install, Denies)
    first, before, after = message.split("\n")
    assert first == (
        "denies of good-package 1.2 returned False, but the printed program changed, first at node "
        "shift_default."
    )
    assert "return %3" in before
    assert "%4 = shift(%3, 1)" in after


@dataclass(frozen=True)
class Misfits(Pass):
    name: ClassVar[str] = "misfits"

    def run(self, program: Program) -> bool:
        node = next(n for n in program.encrypted() if "reshape" in n.name)
        node.args = (node.args[0], [7, 7])
        return True


@dataclass(frozen=True)
class Stumbles(Pass):
    name: ClassVar[str] = "stumbles"

    def run(self, program: Program) -> bool:
        raise KeyError("no such node")


def test_one_that_leaves_an_operator_what_it_does_not_take(install: Install) -> None:
    message = run(install, Misfits)
    first, second, *_ = message.split("\n")
    assert first.startswith("Pass misfits() of good-package 1.2 failed: region: 1 node(s) break")
    assert second.startswith("  reshape_default_1: reshape does not take its arguments: ")
    assert "^^^^" in message


def test_one_that_raises(install: Install) -> None:
    assert run(install, Stumbles) == (
        "Pass stumbles() of good-package 1.2 failed: KeyError: 'no such node'\n"
        "  passes before it: hoist-maps"
    )


def test_one_that_breaks_the_rules_of_the_graph(install: Install) -> None:
    message = run(install, Breaks)
    assert message.startswith("Pass breaks() of good-package 1.2 failed: region: 1 node(s) break")
    assert "it says shape (7,), its operator gives (4, 2, 3)" in message
    assert "^^^^" in message

"""What installed packages add: passes, lowerings and backends, found by entry point.

    [project.entry-points."fhe_fx.passes"]
    cheaper-softmax = "my_package.cheaper_softmax:CheaperSoftmax"

A plugin that fails is reported once, by name, and changes nothing; all others work.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

__all__ = [
    "BACKENDS",
    "LOWERINGS",
    "PASSES",
    "Fault",
    "Plugin",
    "faults",
    "load",
    "loaded",
    "provider",
]

PASSES, LOWERINGS, BACKENDS = "fhe_fx.passes", "fhe_fx.lowerings", "fhe_fx.backends"
"""The entry point groups."""


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package."""

    group: str
    name: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


@dataclass(frozen=True)
class Fault:
    """Why a plugin is not there."""

    plugin: Plugin
    reason: str

    def __str__(self) -> str:
        return (
            f"The plugin {self.plugin} is left out: its entry point {self.plugin.name!r} of "
            f"{self.plugin.group} failed. {self.reason}"
        )


_tried: set[tuple[str, str, str]] = set()
_faults: list[Fault] = []
_providers: dict[Any, Plugin] = {}
_registries: list[Any] = []
_loading: list[list[Any]] = []
"""The content of every registry before each plugin that is being loaded, the last one innermost."""
C = TypeVar("C", dict[Any, Any], set[Any])


def registry(content: C) -> C:
    """Return a dictionary or set that plugins add to: it loses what a failed one had added."""
    _registries.append(content)
    for before in _loading:  # it begins while a plugin is loaded
        before.append(copy.copy(content))
    return content


def load(group: str, register: Callable[[Any], None] = lambda found: None) -> None:
    """Load the plugins of a group that were not tried before.

    Args:
        group: the entry point group.
        register: called with what each entry point names; raises if it cannot be taken.

    Warns:
        UserWarning: for each plugin that fails, once.
    """
    for entry in _entries(group):
        key = (group, entry.name, entry.value)
        if key in _tried:
            continue
        _tried.add(key)
        plugin = _plugin(group, entry)
        before = [copy.copy(r) for r in _registries]
        _loading.append(before)
        try:
            found = entry.load()
            register(found)
        except (Exception, SystemExit) as error:  # whatever foreign code does, the others work
            for held, content in zip(_registries, before, strict=True):
                held.clear()
                held.update(content)
            reason = (str(error).strip() or "no message").splitlines()[0]
            _faults.append(Fault(plugin, f"{type(error).__name__}: {reason}"))
            warnings.warn(str(_faults[-1]), UserWarning, stacklevel=3)
        else:
            _providers[_key(found)] = plugin
            # What one plugin loads while it is loaded stays, also if it fails itself.
            for outer in _loading[:-1]:
                for kept, held, known in zip(outer, _registries, before, strict=True):
                    kept.update(_added(held, known))
        finally:
            _loading.pop()


def _added(held: C, known: C) -> C:
    if isinstance(held, dict):
        return {k: v for k, v in held.items() if k not in known}
    return held - known


def _key(found: Any) -> Any:
    """Return what a plugin's object is known by: itself, or where it is if it has no hash."""
    try:
        hash(found)
    except TypeError:
        return id(found)
    return found


@functools.cache
def _entries(group: str) -> tuple[EntryPoint, ...]:
    """List the entry points of a group, once: a pipeline asks each time that it runs."""
    return tuple(entry_points(group=group))


def _plugin(group: str, entry: EntryPoint) -> Plugin:
    package = entry.dist.name if entry.dist is not None else entry.module
    version = entry.dist.version if entry.dist is not None else "unknown"
    return Plugin(group, entry.name, package, version)


def faults(group: str | None = None) -> list[Fault]:
    """List the plugins that failed so far, of one group or of all."""
    return [f for f in _faults if group in {None, f.plugin.group}]


def loaded() -> list[Plugin]:
    """List the plugins that work, of the groups that were loaded so far."""
    return list(_providers.values())


def provider(found: Any) -> Plugin | None:
    """Return the plugin that an object came from, or None if it is not a plugin's."""
    return _providers.get(_key(found))

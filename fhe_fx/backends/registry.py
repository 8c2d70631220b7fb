"""Backends by name: ours, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fhe_fx import plugins
from fhe_fx.backends.base import Backend
from fhe_fx.errors import BackendError, did_you_mean

__all__ = ["backend_names", "get_backend", "register_backend"]

B = TypeVar("B", bound=Callable[[], Any])


def _reference() -> Backend:
    from fhe_fx.backends.reference import ReferenceBackend

    return ReferenceBackend()


def _concrete() -> Backend:
    from fhe_fx.backends.concrete import ConcreteBackend

    return ConcreteBackend()


_MAKERS: dict[str, Callable[[], Any]] = {"reference": _reference, "concrete": _concrete}


def register_backend(maker: B) -> B:
    """Make a backend known by its name; a decorator of its class.

    Args:
        maker: a class with `name` and `compile`, called without arguments when it is used.

    Raises:
        BackendError: if it has no name, or the name is taken.
    """
    name = getattr(maker, "name", None)
    if not isinstance(name, str) or not callable(getattr(maker, "compile", None)):
        raise BackendError(f"{maker!r} is not a backend: it needs a name and a method compile.")
    known = _MAKERS.get(name, maker)
    if _full_name(known) != _full_name(maker):
        raise BackendError(f"A backend named {name!r} exists: {_full_name(known)}.")
    _MAKERS[name] = maker
    return maker


def _full_name(maker: Callable[[], Any]) -> str:
    return f"{maker.__module__}.{maker.__qualname__}"


def backend_names() -> list[str]:
    """List the backends, those of installed packages included."""
    plugins.load(plugins.BACKENDS, register_backend)
    return sorted(_MAKERS)


def get_backend(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        BackendError: if there is none; close names are suggested.
    """
    if name not in (known := backend_names()):
        for fault in plugins.faults(plugins.BACKENDS):
            if fault.plugin.name == name:
                raise BackendError(f"There is no backend {name!r}. {fault}")
        raise BackendError(f"There is no backend {name!r}.{did_you_mean(name, known)}")
    made: Backend = _MAKERS[name]()
    return made

"""Backends by name: ours, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fhe_fx import plugins
from fhe_fx.backends.base import Backend, CircuitFacts
from fhe_fx.errors import BackendError, FheFxError, did_you_mean
from fhe_fx.ir.program import Program

__all__ = ["backend_names", "facts_by", "get_backend", "register_backend"]

B = TypeVar("B", bound=Callable[[], Any])


def _reference() -> Backend:
    from fhe_fx.backends.reference import ReferenceBackend

    return ReferenceBackend()


def _concrete() -> Backend:
    from fhe_fx.backends.concrete import ConcreteBackend

    return ConcreteBackend()


_MAKERS: dict[str, Callable[[], Any]] = plugins.registry(
    {"reference": _reference, "concrete": _concrete}
)


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
        BackendError: if there is none, and close names are suggested, or it cannot be made.
    """
    if name not in (known := backend_names()):
        for fault in plugins.faults(plugins.BACKENDS):
            if fault.plugin.name == name:
                raise BackendError(f"There is no backend {name!r}. {fault}")
        near = did_you_mean(name, known) or f" There are {', '.join(known)}."
        raise BackendError(f"There is no backend {name!r}.{near}")
    try:
        made: Backend = _MAKERS[name]()
    except (Exception, SystemExit) as error:  # whatever foreign code does
        raise _failure(name, "cannot be made", error) from error
    return made


def facts_by(name: str, program: Program) -> CircuitFacts | None:
    """Compile a program with a backend, and return what it says that the circuit costs.

    Raises:
        BackendError: if there is no such backend, or it fails; names its package.
        FheFxError: as the backend raises it, such as BitWidthError.
    """
    backend = get_backend(name)
    try:
        facts: Any = backend.compile(program).facts
    except FheFxError:
        raise
    except (Exception, SystemExit) as error:
        raise _failure(name, f"failed on {program.name}", error) from error
    if facts is None or isinstance(facts, CircuitFacts):
        return facts
    raise BackendError(
        f"{_named(name)} says what {program.name} costs by a {type(facts).__name__}; a circuit's "
        f"facts are fhe_fx.backends.CircuitFacts, or None."
    )


def _failure(name: str, what: str, error: BaseException) -> BackendError:
    return BackendError(f"{_named(name)} {what}: {type(error).__name__}: {error}")


def _named(name: str) -> str:
    plugin = plugins.provider(_MAKERS[name])
    return f"The backend {name!r} of {plugin}" if plugin else f"The backend {name!r}"

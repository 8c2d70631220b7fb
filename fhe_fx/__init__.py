"""fhe_fx rewrites PyTorch graphs so that a part of a model runs on encrypted data."""

from typing import TYPE_CHECKING, Any

from fhe_fx import passes
from fhe_fx.api import compile, encrypt_submodule, generate, report, set_mode, trace
from fhe_fx.errors import FheFxError
from fhe_fx.export import Cache, save
from fhe_fx.inspection import inspect
from fhe_fx.options import Options
from fhe_fx.passes import register_lowering

if TYPE_CHECKING:
    from fhe_fx.serving.client import connect, from_pretrained

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "FheFxError",
    "Options",
    "__version__",
    "compile",
    "connect",
    "encrypt_submodule",
    "from_pretrained",
    "generate",
    "inspect",
    "passes",
    "register_lowering",
    "report",
    "save",
    "set_mode",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import what needs the `client` extra when it is asked for."""
    if name not in {"connect", "from_pretrained"}:
        raise AttributeError(f"module 'fhe_fx' has no attribute {name!r}")
    try:
        from fhe_fx.serving import client
    except ModuleNotFoundError as error:
        raise ImportError(
            f"fhe_fx.{name} needs {error.name}: pip install 'fhe_fx[client]'"
        ) from error
    return getattr(client, name)

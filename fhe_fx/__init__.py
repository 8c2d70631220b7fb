"""fhe_fx rewrites PyTorch graphs so that a part of a model runs on encrypted data."""

from fhe_fx import passes
from fhe_fx.api import compile, encrypt_submodule, report, set_mode
from fhe_fx.errors import FheFxError
from fhe_fx.options import Options
from fhe_fx.passes import register_lowering

__version__ = "0.1.0"

__all__ = [
    "FheFxError",
    "Options",
    "__version__",
    "compile",
    "encrypt_submodule",
    "passes",
    "register_lowering",
    "report",
    "set_mode",
]

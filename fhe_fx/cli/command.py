"""The `fhe-fx` command: export a region, report its cost, run it, serve it, look around.

Results go to standard output, everything else to standard error; `--json` prints one object.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from fhe_fx.cli.talk import say
from fhe_fx.errors import FheFxError

__all__ = ["app", "main"]

FAILED, INTERRUPTED = 2, 130
_EXTRAS = {"keygen": "client", "run": "client", "serve": "server"}
"""Commands that need more than the core."""
_OBJECTS = 50_000
"""New objects after which Python looks for garbage in cycles: graphs have many and drop few, and by
default (700) a tenth of a command's time goes into looking."""
_ONNX = {"onnx", "onnxruntime", "onnxscript"}


class _Group(TyperGroup):
    """Turns the errors that users can act on into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # typer has a click of its own, which it does not show
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries about themselves
            warnings.filterwarnings("always", category=UserWarning, module=r"fhe_fx\.")
            warnings.showwarning = lambda message, *rest: say(f"warning: {message}")
            try:
                return super().invoke(ctx)
            except FheFxError as error:
                say(f"error: {error}", "bold red")
            except OSError as error:
                if error.errno == errno.EPIPE:
                    raise
                say(f"error: {error}", "bold red")
            except ModuleNotFoundError as error:
                extra = "onnx" if error.name in _ONNX else _EXTRAS.get(ctx.invoked_subcommand)
                if extra is None:
                    raise
                say(f"error: This needs {error.name}: pip install 'fhe_fx[{extra}]'", "bold red")
            except KeyboardInterrupt:
                say("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            raise typer.Exit(FAILED)


app = typer.Typer(
    cls=_Group,
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def few_collections() -> None:
    """Let Python look for garbage seldom, from now on."""
    gc.freeze()  # what was imported stays
    gc.set_threshold(_OBJECTS)


def main() -> None:
    """Run the command and exit."""
    few_collections()
    try:
        app()
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()  # what is left goes with the process; nobody has to look through it
        if error.code == INTERRUPTED:
            os._exit(INTERRUPTED)  # a native thread may still run, and cannot be stopped
        raise
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None

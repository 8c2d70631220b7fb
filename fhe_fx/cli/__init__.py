"""The `fhe-fx` command, a file for each group of commands; nothing else of the package prints."""

from fhe_fx.cli.command import app, main

# Help lists commands in the order in which they are registered here.
# isort: off
from fhe_fx.cli import export, report, run, language, serving, graphs, machine  # noqa: F401
# isort: on

__all__ = ["app", "main"]

"""What commands print, show while they work, and do so that Ctrl-C ends it."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

__all__ = ["interruptibly", "print_json", "print_text", "progress", "say", "size_of"]

T = TypeVar("T")


def say(text: str, style: str = "") -> None:
    """Print on standard error, unwrapped."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text(text, style=style))


def print_text(text: str) -> None:
    """Print on standard output, unwrapped."""
    Console(soft_wrap=True, highlight=False).print(Text(text))


def print_json(value: dict[str, Any]) -> None:
    """Print one object on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, on a terminal only; the callback changes the text."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: None
        return
    with console.status(f"{text} ...") as status:
        yield lambda stage: status.update(f"{stage} ...")


def interruptibly(action: Callable[[], T]) -> T:
    """Run native code that Ctrl-C could not stop in a thread of its own, and wait for it.

    Concrete compiles only in the thread that imported it, so this is for keys and execution.
    """
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(action())
        except BaseException as error:  # raised again in the main thread
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        for number, handler in handlers.items():  # Concrete's HPX puts its own, which crash
            signal.signal(number, handler)
    if failed:
        raise failed[0]
    return found[0]


def size_of(n_bytes: int) -> str:
    """Say how many bytes, in MB or kB."""
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:.1f} kB"

"""The temporary folders that Concrete compiles into: each is removed when its server is.

`Server.create` writes machine code and parameters to a new folder of the system's temporary
directory, reads them there at every run, and leaves them for ever, also where compilation fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from concrete.fhe.compilation import server as concrete_server

__all__ = ["owned_folders"]

_LOCK = threading.Lock()


class _Recorder:
    """Stands in for `tempfile` in Concrete's module, and remembers what one thread makes."""

    TemporaryDirectory = tempfile.TemporaryDirectory

    def __init__(self) -> None:
        self.made: list[str] = []
        self._thread = threading.get_ident()

    def mkdtemp(self) -> str:
        folder = tempfile.mkdtemp(prefix="fhe_fx-")
        if threading.get_ident() == self._thread:
            self.made.append(folder)
        return folder


@contextlib.contextmanager
def owned_folders() -> Iterator[Callable[[Any], None]]:
    """Let Concrete compile; give a function that ties a server to the folder it was compiled into.

    The folder goes when the server is collected, or the process ends. Folders of servers that were
    never tied, since compilation failed, go at once.
    """
    with _LOCK:
        recorder = _Recorder()
        concrete_server.tempfile = recorder
        kept: set[str] = set()

        def keep(server: Any) -> None:
            folder = str(server._library.get_output_dir_path())
            assert folder in recorder.made, (folder, recorder.made)
            weakref.finalize(server, _remove, folder, os.getpid())
            kept.add(folder)

        try:
            yield keep
        finally:
            concrete_server.tempfile = tempfile
            for folder in set(recorder.made) - kept:
                shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not that of a process that was forked off
        shutil.rmtree(folder, ignore_errors=True)

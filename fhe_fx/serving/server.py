"""`fhe-fx serve`: reads bundles, refuses unsafe settings, and runs the application with uvicorn."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import logging
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from fhe_fx.errors import ArtifactError, OptionsError
from fhe_fx.export.bundle import ServerBundle, load_server_bundle
from fhe_fx.export.manifest import MANIFEST
from fhe_fx.serving.app import Settings, create_app
from fhe_fx.serving.engine import LocalPool
from fhe_fx.serving.runs import Limits
from fhe_fx.serving.store import DirectoryKeyStore
from fhe_fx.serving.tokens import Tokens

__all__ = ["ServeOptions", "serve", "server_bundles"]

CONNECTIONS = 256
HEAD_SECONDS = 30.0
"""How long the head of a request may take, from its first byte or from the connection on."""


@dataclass(frozen=True)
class ServeOptions:
    """How a directory is served."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes a free one."""
    token_file: Path | None = None
    key_store: Path | None = None
    """Keys and results; by default `SERVER_DIR.store` beside the bundle."""
    workers: int = 1
    worker_gigabytes: float = 0.0
    """Memory of a worker; 0 takes four fifths of the machine's, shared by the workers."""
    key_gigabytes: float = 2.0
    """Evaluation keys that a worker keeps in memory."""
    grace: float = 60.0
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    limits: Limits = field(default_factory=Limits)


def server_bundles(directory: Path) -> dict[str, ServerBundle]:
    """Read a server's bundle, or all of those in a directory.

    Returns:
        Bundles by their id.

    Raises:
        ArtifactError: if there is none, or one is damaged.
    """
    here = (directory / MANIFEST).is_file()
    folders = [directory] if here else sorted(p.parent for p in directory.glob(f"*/{MANIFEST}"))
    if not folders:
        raise ArtifactError(
            f"{directory} holds no server's bundle. Make one with: fhe-fx export; it is the "
            f"directory `server` of what is written."
        )
    return {str(b.manifest["bundle"]): b for b in map(load_server_bundle, folders)}


def _unpacked(bundles: Mapping[str, ServerBundle], root: Path) -> dict[str, Any]:
    """Write the machine code of circuits where workers load it, and say what they must know."""
    shutil.rmtree(root, ignore_errors=True)  # of an earlier start
    circuits = {}
    for name, bundle in bundles.items():
        folder = root / name
        folder.mkdir(mode=0o700, parents=True)
        for file, content in bundle.files.items():
            (folder / file).write_bytes(content)
        manifest = bundle.manifest
        circuits[name] = {
            "folder": str(folder),
            "wire": manifest["wire"],
            "key_bytes": manifest["cost"]["key_bytes"],
        }
    return circuits


def serve(
    directory: Path, options: ServeOptions, on_ready: Callable[[str], None] = lambda url: None
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        directory: a server's bundle, or a directory of such.
        options: how.
        on_ready: told the URL once requests are answered.

    Raises:
        ArtifactError: if a bundle is damaged.
        OptionsError: if the settings are unsafe, or the port or the store is taken.
    """
    bundles = server_bundles(directory)
    tokens = _tokens(options)
    directory = directory.resolve()
    store = options.key_store or directory.with_name(f"{directory.name}.store")
    with _lock(store), _listen(options) as listener:
        _log_to_stderr()
        app = _application(bundles, store, tokens, options)
        scheme = "https" if options.tls_certificate else "http"
        host, port = listener.getsockname()[:2]
        config = uvicorn.Config(
            app, http=_Impatient, lifespan="on",
            log_config=None, access_log=False, server_header=False,
            limit_concurrency=CONNECTIONS, timeout_keep_alive=30, timeout_graceful_shutdown=30,
            ssl_certfile=options.tls_certificate, ssl_keyfile=options.tls_key,
        )  # fmt: skip
        server = _Uvicorn(config, app, lambda: on_ready(f"{scheme}://{host}:{port}"))
        server.run(sockets=[listener])


def _application(
    bundles: Mapping[str, ServerBundle], store: Path, tokens: Tokens, options: ServeOptions
) -> FastAPI:
    engine = LocalPool(
        _unpacked(bundles, store / "circuits"),
        options.workers, _worker_memory(options), int(options.key_gigabytes * 1e9),
    )  # fmt: skip
    manifests = {name: bundle.manifest for name, bundle in bundles.items()}
    keys = DirectoryKeyStore(store / "keys")
    return create_app(
        Settings(manifests, engine, keys, store / "runs", tokens, options.limits, options.grace)
    )


class _Impatient(H11Protocol):
    """Closes a connection on which the head of a request does not come, or too slowly."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Go on waiting, unless the head is complete."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        is_awaited = self.cycle is None or self.cycle.response_complete
        if is_awaited and self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif self._timer is not None and not is_awaited:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)


class _Uvicorn(uvicorn.Server):
    """Says when it is ready, and stops taking runs as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, app: Any, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._on_ready = app, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more runs and end; uvicorn's own would kill this process with `sig` at last."""
        self._app.state.server.runs.is_draining = True
        self.should_exit = True  # a second Ctrl-C is no reason to lose work


def _tokens(options: ServeOptions) -> Tokens:
    if options.token_file is not None:
        return Tokens.read(options.token_file)
    try:
        is_loopback = ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        is_loopback = options.host == "localhost"
    if not is_loopback:
        raise OptionsError(
            f"--host {options.host} can be reached from other machines, and without --token-file "
            f"everybody could use it. Give a token file, or --host 127.0.0.1."
        )
    return Tokens(None)


def _worker_memory(options: ServeOptions) -> int:
    if options.worker_gigabytes:
        return int(options.worker_gigabytes * 1e9)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine * 4 // 5 // options.workers


def _listen(options: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
    except OSError as error:
        listener.close()
        raise OptionsError(
            f"{options.host}:{options.port} cannot be listened on: {error.strerror}. "
            f"Choose another --port, or 0 for a free one."
        ) from error
    return listener


def _lock(store: Path) -> IO[bytes]:
    """Keep other servers out of a store for as long as this process lives."""
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = (store / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OptionsError(
            f"{store} is used by another server. Stop it, or give another --key-store."
        ) from error
    return file


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("fhe_fx.serving")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)

"""`fhe-fx serve`: reads bundles, refuses unsafe settings, and runs the application with uvicorn."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from fhe_fx.errors import ArtifactError, OptionsError
from fhe_fx.export.bundle import load_server_bundle
from fhe_fx.export.manifest import MANIFEST
from fhe_fx.serving.app import Settings, create_app
from fhe_fx.serving.engine import LocalPool
from fhe_fx.serving.runs import Limits
from fhe_fx.serving.store import DirectoryKeyStore
from fhe_fx.serving.tokens import Tokens

__all__ = ["ServeOptions", "serve", "server_bundles"]

CONNECTIONS = 256


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


def server_bundles(directory: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Read a server's bundle, or all of those in a directory.

    Returns:
        Directory and manifest by bundle id.

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
    manifests = [(f.resolve(), load_server_bundle(f).manifest) for f in folders]
    return {str(m["bundle"]): (f, m) for f, m in manifests}


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
        OptionsError: if the settings are unsafe, or the port is taken.
    """
    bundles = server_bundles(directory)
    tokens = _tokens(options)
    directory = directory.resolve()
    store = options.key_store or directory.with_name(f"{directory.name}.store")
    engine = LocalPool(
        {k: folder for k, (folder, _) in bundles.items()},
        options.workers, _worker_memory(options), int(options.key_gigabytes * 1e9),
    )  # fmt: skip
    settings = Settings(
        {k: manifest for k, (_, manifest) in bundles.items()}, engine,
        DirectoryKeyStore(store / "keys"), store / "runs", tokens, options.limits, options.grace,
    )  # fmt: skip
    _log_to_stderr()
    app = create_app(settings)
    listener = _listen(options)
    scheme = "https" if options.tls_certificate else "http"
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30, timeout_graceful_shutdown=30, lifespan="on",
        ssl_certfile=options.tls_certificate, ssl_keyfile=options.tls_key,
    )  # fmt: skip
    _Uvicorn(config, app, lambda: on_ready(f"{scheme}://{host}:{port}")).run(sockets=[listener])


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


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("fhe_fx.serving")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)

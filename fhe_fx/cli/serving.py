"""`fhe-fx keygen` and `serve`: a client's keys, and the server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fhe_fx.cli.command import app
from fhe_fx.cli.options import PassphraseFile, passphrase_of
from fhe_fx.cli.talk import interruptibly, print_text, progress, size_of

__all__ = ["keygen", "serve"]


@app.command()
def keygen(
    client: Annotated[Path, typer.Argument(help="The directory `client` of an export.")],
    keys: Annotated[
        Path | None, typer.Option(help="Directory to write; by default CLIENT.keys beside it.")
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a client's keys: secret keys that only you can read, evaluation keys for the server."""
    from fhe_fx.serving.keys import make_keys

    passphrase = passphrase_of(passphrase_file)
    with progress("making keys") as show:
        all_made = interruptibly(lambda: make_keys(client, keys, passphrase, show))
    how = "encrypted under the passphrase" if passphrase else "readable by you alone"
    for made in all_made:
        size = size_of(made.evaluation.stat().st_size)
        print_text(f"{made.secret}: secret keys, {how}; never give them away")
        print_text(f"{made.evaluation}: {size} for the server, id {made.id}")


@app.command()
def serve(
    directory: Annotated[
        Path, typer.Argument(help="The directory `server` of an export, or a directory of such.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8080,
    token_file: Annotated[
        Path | None, typer.Option(help="Lines `TENANT TOKEN`, mode 0600; needed beyond loopback.")
    ] = None,
    key_store: Annotated[
        Path | None, typer.Option(help="Keys and results; by default SERVER_DIR.store beside it.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at once; each uses every core.")] = 1,
    worker_memory: Annotated[
        float, typer.Option(min=0, help="GB that a worker may use; 0 shares out the machine's.")
    ] = 0,
    key_memory: Annotated[float, typer.Option(min=0, help="GB of keys that a worker keeps.")] = 2,
    queue: Annotated[int, typer.Option(min=1, help="Runs that may wait or be computed.")] = 16,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one run may take.")] = 3600,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish in at the end.")] = 60,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
) -> None:
    """Run circuits for clients, who keep data and secret keys.

    Prints its URL when it is ready; logs one JSON object a line on standard error.
    """
    from fhe_fx.serving.runs import Limits
    from fhe_fx.serving.server import ServeOptions
    from fhe_fx.serving.server import serve as run_server

    limits = Limits(queue=queue, tenant_queue=max(1, queue // 2), timeout=timeout)
    options = ServeOptions(
        host, port, token_file, key_store, workers, worker_memory, key_memory, grace,
        tls_certificate, tls_key, limits,
    )  # fmt: skip
    run_server(directory, options, _say_ready)


def _say_ready(url: str) -> None:
    print_text(url)
    sys.stdout.flush()

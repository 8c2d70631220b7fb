"""`fhe-fx run`: an exported circuit on real inputs, here or on a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fhe_fx.cli.command import app
from fhe_fx.cli.options import PassphraseFile, passphrase_of
from fhe_fx.cli.talk import interruptibly, print_text, progress, say
from fhe_fx.errors import InputError, OptionsError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["run"]


@app.command()
def run(
    directory: Annotated[Path, typer.Argument(help="A directory that export wrote.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", help="A .npy of real numbers; once for each input."),
    ] = None,
    mode: Annotated[str, typer.Option(help="clear, simulate, execute or remote.")] = "simulate",
    output: Annotated[
        list[Path] | None, typer.Option(help="Where to write results; once for each.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="File of secret keys, made if missing; without it they stay in memory. For "
            "--mode remote the directory that keygen wrote, by default CLIENT.keys."
        ),
    ] = None,
    server: Annotated[str | None, typer.Option(help="URL of a server, for --mode remote.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Its text is the bearer token for the server.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    prompt: Annotated[
        str | None, typer.Option(help="With --mode remote, in place of --input: text to go on.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after --prompt.")] = 1,
) -> None:
    """Run an exported circuit, without its model, on real inputs of its region.

    In mode remote a server runs it, and only the client's directory is needed; with --prompt the
    client's model writes on. In the other modes the artefact's machine code runs here: run only
    what comes from where you trust.
    """
    from fhe_fx.errors import did_you_mean

    modes = ("clear", "simulate", "execute", "remote")
    if mode not in modes:
        raise OptionsError(
            f"--mode {mode!r} is not one of {', '.join(modes)}.{did_you_mean(mode, list(modes))}"
        )
    if keys is not None and mode not in {"execute", "remote"}:
        raise OptionsError(f"--keys is for --mode execute or remote; --mode {mode} has no keys.")
    if (mode == "remote") != (server is not None):
        raise OptionsError("--mode remote and --server URL go together.")
    if bool(inputs) == (prompt is not None) or (prompt is not None and mode != "remote"):
        raise OptionsError("Give --input X.npy; or, with --mode remote, --prompt TEXT.")
    _check_outputs(output)
    if server is None:
        _give(_run_here(directory, mode, inputs or [], output, keys), output)
        return
    access: dict[str, Any] = {
        "token": token_file.read_text(encoding="utf-8").strip() if token_file else None,
        "passphrase": passphrase_of(passphrase_file),
        "keys": keys,
    }
    with progress(f"connecting to {server}") as show:
        access["on_stage"] = show
        if prompt is not None:
            text = interruptibly(lambda: _write_on(directory, server, prompt, new_tokens, access))
            print_text(text)
            return
        results = interruptibly(lambda: _run_there(directory, server, inputs or [], access))
    _give(results, output)


def _check_outputs(output: list[Path] | None) -> None:
    for path in output or []:
        if not path.parent.is_dir():
            raise OptionsError(f"--output {path}: there is no directory {path.parent}.")


def _run_here(
    directory: Path, mode: str, inputs: list[Path], output: list[Path] | None, keys: Path | None
) -> list[Tensor]:
    from fhe_fx.export import load_artifact
    from fhe_fx.report import Report

    with load_artifact(directory) as artifact, progress(f"running, mode {mode}"):
        n_results = len(artifact.codec.results)
        if output and len(output) != n_results:
            raise OptionsError(f"{len(output)} --output given; the circuit has {n_results}.")
        given = [_array(path) for path in inputs]
        artifact.codec.check(given)
        if mode != "execute":
            return artifact.clear(given) if mode == "clear" else artifact.simulate(given)
        say(Report.from_costs([artifact.manifest["cost"]]).regions[0].line())
        circuit = artifact.circuit()
        interruptibly(lambda: _prepare_keys(circuit, keys))
        return interruptibly(lambda: artifact.execute(given))


def _run_there(
    directory: Path, server: str, inputs: list[Path], access: dict[str, Any]
) -> list[Tensor]:
    from fhe_fx.serving.client import connect

    with connect(server, client=directory, **access) as connection:
        return connection.run([_array(path) for path in inputs])


def _write_on(
    directory: Path, server: str, prompt: str, new_tokens: int, access: dict[str, Any]
) -> str:
    """Let a client's model continue a text, and return what it adds."""
    from transformers import AutoTokenizer

    import fhe_fx
    from fhe_fx.export.pretrained import client_directory
    from fhe_fx.runtime.whole import Call
    from fhe_fx.serving.client import from_pretrained

    model: Any = from_pretrained(directory, remote=server, **access)
    tokenizer = AutoTokenizer.from_pretrained(client_directory(directory))
    if isinstance(model.__dict__.get("forward"), Call):  # all of it runs there, row by row
        tokens = fhe_fx.generate(model, tokenizer(prompt)["input_ids"], max_new_tokens=new_tokens)
        return str(tokenizer.decode([token.id for token in tokens]))
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, given["input_ids"].shape[1] :]))


def _array(path: Path) -> Tensor:
    import torch

    from fhe_fx.errors import CalibrationError
    from fhe_fx.export.arrays import load_array

    if not path.is_file():
        raise InputError(f"There is no input file {path}.")
    try:
        return torch.from_numpy(load_array(path)).float()
    except CalibrationError as error:
        raise InputError(str(error)) from error


def _prepare_keys(circuit: Any, keys: Path | None) -> None:
    if keys is None:
        circuit.keygen()
    elif keys.exists():
        circuit.load_keys(keys)
    else:
        circuit.save_keys(keys)


def _give(results: list[Tensor], output: list[Path] | None) -> None:
    import numpy as np

    for number, result in enumerate(results):
        array = result.numpy()
        if output:
            with output[number].open("wb") as file:
                np.save(file, array, allow_pickle=False)
            say(f"{output[number]}: {array.dtype} {list(array.shape)}")
        else:
            print_text(np.array2string(array, precision=4, suppress_small=True, threshold=200))

"""The `fhe-fx` command: export a region, report its cost, run it, serve it, look around.

Results go to standard output, everything else to standard error; `--json` prints one object.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from fhe_fx.errors import FheFxError, InputError, OptionsError, TargetError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fhe_fx.backends import CircuitFacts
    from fhe_fx.export.cache import Cache
    from fhe_fx.export.models import NamedModel
    from fhe_fx.inspection.results import Inspection
    from fhe_fx.ir.program import Program
    from fhe_fx.passes import Pipeline
    from fhe_fx.report import RegionCost
    from fhe_fx.runtime.region import Region

__all__ = ["app", "main"]

FAILED, INTERRUPTED = 2, 130
_EXTRAS = {"keygen": "client", "run": "client", "serve": "server"}
"""Commands that need more than the core."""
_DUMP = "FHE_FX_DUMP"
"""Environment variable: a directory for the print and the data after each pass."""
_CACHE, _CACHE_GB = "FHE_FX_CACHE", "FHE_FX_CACHE_GB"
"""Environment variables: a directory for what was lowered, or `off`; its bound."""
_ONNX = {"onnx", "onnxruntime", "onnxscript"}
T = TypeVar("T")


class _Group(TyperGroup):
    """Turns the errors that users can act on into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # typer has a click of its own, which it does not show
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries about themselves
            warnings.filterwarnings("always", category=UserWarning, module=r"fhe_fx\.")
            warnings.showwarning = lambda message, *rest: _say(f"warning: {message}")
            try:
                return super().invoke(ctx)
            except FheFxError as error:
                _say(f"error: {error}", "bold red")
            except OSError as error:
                if error.errno == errno.EPIPE:
                    raise
                _say(f"error: {error}", "bold red")
            except ModuleNotFoundError as error:
                extra = "onnx" if error.name in _ONNX else _EXTRAS.get(ctx.invoked_subcommand)
                if extra is None:
                    raise
                _say(f"error: This needs {error.name}: pip install 'fhe_fx[{extra}]'", "bold red")
            except KeyboardInterrupt:
                _say("interrupted")
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


def main() -> None:
    """Run the command and exit."""
    try:
        app()
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        if error.code == INTERRUPTED:
            os._exit(INTERRUPTED)  # a native thread may still run, and cannot be stopped
        raise
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


# Talking --------------------------------------------------------------------------------------


def _say(text: str, style: str = "") -> None:
    """Print on standard error, unwrapped."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text(text, style=style))


def _print(text: str) -> None:
    """Print on standard output, unwrapped."""
    Console(soft_wrap=True, highlight=False).print(Text(text))


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@contextmanager
def _progress(text: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, on a terminal only; the callback changes the text."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: None
        return
    with console.status(f"{text} ...") as status:
        yield lambda stage: status.update(f"{stage} ...")


def _interruptibly(action: Callable[[], T]) -> T:
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


# Options that commands share ------------------------------------------------------------------

Submodule = Annotated[
    str | None,
    typer.Option(help="Part to encrypt: a path, a unique suffix, a glob or re:... that names one."),
]
Submodules = Annotated[
    list[str] | None,
    typer.Option(
        "--submodule",
        help="Part to encrypt: a path, a unique suffix, a glob or re:...; once for each.",
    ),
]
NBits = Annotated[int, typer.Option(help="Bits of a quantized activation.")]
Tokens = Annotated[
    int | None, typer.Option(help="Rows of the circuit; by default 8, or as calibration has.")
]
Lengths = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        help="Rows of the circuit; or of several with keys in common, as in 4,8,16. By default 8, "
        "or as calibration has.",
    ),
]
Heads = Annotated[
    str | None, typer.Option(help="Encrypt these heads of an attention only, as in 0 or 0,3.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Sentences, one a line, or a .npy of inputs; else the model writes its own."),
]
PError = Annotated[
    float | None, typer.Option(help="Probability that a look-up reads the neighbouring entry.")
]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="Its text encrypts the secret keys, or decrypts them.")
]
Seed = Annotated[int, typer.Option(help="Of random weights and of sampled calibration.")]
Passes = Annotated[
    str | None,
    typer.Option(
        "--passes",
        help="A .toml file, or text: default,-drop-this,my-pass{option=1}@before:that.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face directory or hub name, smollm2, random:gpt2, a .pt2 or an .onnx file."
    ),
]


def _head_numbers(heads: str | None) -> list[int] | None:
    if heads is None:
        return None
    try:
        return [int(h) for h in heads.split(",")]
    except ValueError:
        raise OptionsError(
            f"--heads {heads!r} is not a list of numbers. Write 0, or 0,3."
        ) from None


def _pipeline(passes: str | None) -> Pipeline:
    from fhe_fx.extend import parse_pipeline, read_pipeline
    from fhe_fx.passes import default_pipeline

    dump_dir = Path(os.environ[_DUMP]) if os.environ.get(_DUMP) else None
    if passes is None:
        return default_pipeline().dumping(dump_dir)
    read = read_pipeline(Path(passes)) if passes.endswith(".toml") else parse_pipeline(passes)
    return read.dumping(dump_dir)


def _cache() -> Cache | None:
    """Return where lowered programs are kept, or None if they are not."""
    from fhe_fx.export.cache import MOST_BYTES, Cache, cache_directory

    place = os.environ.get(_CACHE, "")
    if place.lower() in {"off", "0", "none"}:
        return None
    text = os.environ.get(_CACHE_GB, "")
    try:
        most = int(float(text) * 1e9) if text else MOST_BYTES
    except (ValueError, OverflowError):
        most = -1
    if most < 0:
        raise OptionsError(f"{_CACHE_GB}={text!r} is not a size in GB. Try {_CACHE_GB}=1.")
    return Cache(Path(place) if place else cache_directory(), most)


def _lowered(
    model: str,
    submodules: list[str] | None,
    n_bits: int,
    lengths: tuple[int, ...] | None,
    heads: str | None,
    calibration: Path | None,
    p_error: float | None,
    seed: int,
    passes: str | None = None,
    *,
    is_one: bool = False,
) -> tuple[list[Region], nn.Module | Program, NamedModel]:
    """Load a model and lower parts of it; with `is_one`, refuse more than one circuit before.

    Returns:
        A region for each circuit; the model that they stand in, or the exported graph; what was
        loaded.
    """
    from fhe_fx.export.models import load_calibration, load_model

    if not submodules:
        raise OptionsError("Give the part to encrypt: --submodule h.0.attn")
    chosen, pipeline = _head_numbers(heads), _pipeline(passes)
    pipeline.check()
    options = _options(n_bits, seed, p_error)
    named = load_model(model, seed)
    samples = load_calibration(calibration, named) if calibration is not None else None
    if named.exported is not None:
        graph, region = _exported_region(
            named.exported, submodules, lengths, chosen, samples, options, pipeline, _cache()
        )
        return [region], graph, named
    from torch import fx

    import fhe_fx
    from fhe_fx.api import encrypted_modules
    from fhe_fx.capture import resolve_targets, submodules_of

    assert named.module is not None
    module = named.module
    if isinstance(module, fx.GraphModule):
        module, submodules = submodules_of(module, submodules)
    paths = resolve_targets(module, submodules)
    if is_one:
        _one(paths)
        if len(lengths or ()) > 1:
            raise OptionsError(f"--tokens {','.join(map(str, lengths or ()))}: give one length.")
    encrypted = fhe_fx.encrypt_submodule(
        module,
        submodules,
        n_bits=n_bits,
        max_tokens=lengths,
        heads=chosen,
        calibration=samples,
        options=options,
        passes=pipeline,
        cache=_cache(),
    )
    return [part.region for part in encrypted_modules(encrypted)], encrypted, named


def _exported_region(
    exported: Any,
    submodules: list[str],
    lengths: tuple[int, ...] | None,
    heads: list[int] | None,
    samples: list[Tensor] | None,
    options: Any,
    pipeline: Pipeline,
    cache: Cache | None,
) -> tuple[Program, Region]:
    from fhe_fx.export.exported import exported_region, exported_targets, open_exported
    from fhe_fx.ir import dialect as d
    from fhe_fx.runtime.lower import run_pipeline

    whole = open_exported(exported)
    path = _one([path for s in submodules for path in exported_targets(whole, s)])
    shape = d.shape_of(whole.placeholders[0])
    if lengths is not None and (len(shape) < 2 or lengths != (shape[1],)):
        asked = ",".join(map(str, lengths))
        raise OptionsError(
            f"--tokens {asked}: the exported program takes an input of shape {list(shape)}, and "
            f"shapes are fixed in a .pt2. Leave --tokens out, or export with {asked} tokens."
        )
    lower = run_pipeline if cache is None else cache.lowered
    region = exported_region(whole, path, heads, samples, pipeline, options, lower)
    return whole, region


def _one(paths: list[str]) -> str:
    if len(paths) > 1:
        raise TargetError(
            f"--submodule names {len(paths)} parts: {', '.join(paths[:8])}. Give one here."
        )
    return paths[0]


# Commands -------------------------------------------------------------------------------------


@app.command()
def export(
    model: Model,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; an older artefact is replaced.")
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(help="Directory of ONNX models to write: the float rest, and the integers."),
    ] = None,
    submodule: Submodules = None,
    n_bits: NBits = 4,
    tokens: Lengths = None,
    heads: Heads = None,
    calibration: Calibration = None,
    p_error: PError = None,
    seed: Seed = 0,
    evaluation: Annotated[
        Path | None, typer.Option(help="An evaluation.json, whose figures go into the model card.")
    ] = None,
    circuit_only: Annotated[
        bool, typer.Option("--circuit-only", help="Leave out the client's model: the circuit only.")
    ] = False,
    passes: Passes = None,
    no_validate: Annotated[
        bool, typer.Option("--no-validate", help="Do not reload and compare what was written.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Encrypt parts of a model and write client's and server's files, ONNX models, or both.

    Each part has a circuit for each length; they share keys where their parameters allow it.
    """
    from fhe_fx.evaluate.results import card_figures
    from fhe_fx.export import FILES, check_destination, export_region, save
    from fhe_fx.ir.program import Program

    if out is None and onnx is None:
        raise OptionsError("Give where to write: --out DIR, --onnx DIR, or both.")
    if out is not None:
        check_destination(out, FILES)
    if onnx is not None:
        _check_onnx(onnx)
    lengths = _lengths(tokens) if tokens else None
    accuracy = card_figures(evaluation, n_bits) if evaluation else None
    with _progress("loading and lowering the model") as show:
        regions, whole, named = _lowered(
            model, submodule, n_bits, lengths, heads, calibration, p_error, seed, passes,
            is_one=circuit_only or onnx is not None,
        )  # fmt: skip
        for cost in _costs(regions, [None] * len(regions)):
            _say(cost.line())
        onnx_manifest = _export_onnx(whole, regions[0], onnx, model, show) if onnx else None
        if out is None:
            if as_json:
                _print_json({"onnx": str(onnx), **(onnx_manifest or {})})
            return
        show("compiling")
        for cost in _costs(regions, [region.circuit().facts for region in regions]):
            _say(cost.line())
        told: dict[str, Any] = {"validate": not no_validate, "origin": model, "on_stage": show}
        if isinstance(whole, Program) or circuit_only:
            export_region(regions[0], out, **told)
        else:
            tokenizer = _tokenizer_if_any(named)
            save(whole, out, tokenizer=tokenizer, accuracy=accuracy, **told)
    if as_json:
        summary = _export_summary(out)
        _print_json(summary | ({"onnx": str(onnx)} if onnx else {}))
        return
    sizes = [f"{party} {_size(_bytes_of(out / party))}" for party in ("client", "server")]
    _print(f"{out}: {', '.join(sizes)}")
    artefacts = _artefacts(out)
    for manifest in artefacts:
        if manifest["validation"]:
            name = _of_several(manifest) if len(artefacts) > 1 else ""
            _print(name + _validation_line(manifest["validation"]))


def _of_several(manifest: dict[str, Any]) -> str:
    tokens = manifest["cost"]["tokens"]
    return f"{manifest['name']}{'' if tokens is None else f' at {tokens} tokens'}: "


def _costs(regions: list[Region], facts: Sequence[CircuitFacts | None]) -> tuple[RegionCost, ...]:
    """Return what circuits cost; the length of each where a part has several."""
    from fhe_fx.report import report_on

    lengths = [r.tokens if _has_others(r, regions) else None for r in regions]
    programs = [region.program for region in regions]
    return report_on(list(zip(programs, facts, strict=True)), lengths).regions


def _has_others(region: Region, regions: list[Region]) -> bool:
    """Say whether a part has circuits of several lengths."""
    return sum(r.circuit_name == region.circuit_name for r in regions) > 1


def _tokenizer_if_any(named: NamedModel) -> Any:
    from fhe_fx.export.models import ModelError

    try:
        return named.tokenizer()
    except ModelError:
        return None


def _bytes_of(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def _check_onnx(directory: Path) -> None:
    from fhe_fx.export import check_destination
    from fhe_fx.export.manifest import ONNX_FORMAT
    from fhe_fx.export.onnx import ONNX_FILES

    check_destination(directory, ONNX_FILES, format=ONNX_FORMAT)


def _export_onnx(
    whole: Any, region: Region, directory: Path, origin: str, on_stage: Callable[[str], None]
) -> dict[str, Any]:
    from fhe_fx.export.onnx import export_onnx, write_onnx
    from fhe_fx.ir.program import Program

    if isinstance(whole, Program):
        manifest = write_onnx(whole, region, directory, origin=origin, on_stage=on_stage)
    else:
        manifest = export_onnx(whole, directory, origin=origin, on_stage=on_stage)
    checked = manifest["validation"]
    sizes = [f"{name} {_size(file['bytes'])}" for name, file in manifest["files"].items()]
    _say(f"{directory}: {', '.join(sizes)}")
    _say(
        f"validated in ONNX Runtime: integers equal on {checked['samples']} samples, floats within "
        f"{checked['float_error']:.1g} of the largest"
    )
    return manifest


def _artefacts(out: Path) -> list[dict[str, Any]]:
    """Read the manifests of the circuits in a directory that an export wrote, of one or several."""
    from fhe_fx.export import read_artefacts

    return read_artefacts(out, check_versions=False)


def _export_summary(out: Path) -> dict[str, Any]:
    """Describe an export of one circuit; or of several, under `circuits`."""
    from fhe_fx.export import read_stated

    summaries = [_circuit_summary(manifest) for manifest in _artefacts(out)]
    told = summaries[0] if len(summaries) == 1 else {"circuits": summaries}
    return {"out": str(out), **told, "files": read_stated(out)["files"]}


def _circuit_summary(manifest: dict[str, Any]) -> dict[str, Any]:
    from fhe_fx.report import Report

    kept = ("module_path", "heads", "inputs", "results", "validation", "versions")
    cost = Report.from_costs([manifest["cost"]]).regions[0]
    return {
        **{k: v for k, v in manifest["cost"].items() if k != "nodes"},
        "estimated_seconds": cost.estimated_seconds,
        **{k: manifest[k] for k in kept},
        "nodes": manifest["cost"]["nodes"],
    }


def _validation_line(v: dict[str, Any]) -> str:
    return (
        f"validated on {v['samples']} calibration samples: reloaded clear results equal; relative "
        f"error {v['clear_error_to_float']:.3f} clear to float, "
        f"{v['simulated_error_to_clear']:.3f} simulated to clear"
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:.1f} kB"


@app.command()
def report(
    model: Annotated[str, typer.Argument(help="A directory that export wrote, or a MODEL.")],
    submodule: Submodules = None,
    n_bits: NBits = 4,
    tokens: Lengths = None,
    heads: Heads = None,
    calibration: Calibration = None,
    p_error: PError = None,
    seed: Seed = 0,
    passes: Passes = None,
    backend: Annotated[
        str, typer.Option(help="Who compiles, and says what it costs.")
    ] = "concrete",
    as_json: AsJson = False,
) -> None:
    """Say what each circuit costs, look-up by look-up."""
    from fhe_fx.export import MANIFEST
    from fhe_fx.report import Report

    if (Path(model) / MANIFEST).is_file():
        found = Report.from_costs([manifest["cost"] for manifest in _artefacts(Path(model))])
    elif not submodule:
        raise OptionsError(
            f"{model} holds no {MANIFEST}, so it is read as a MODEL; then give --submodule too."
        )
    else:
        with _progress("loading and lowering the model") as show:
            lengths = _lengths(tokens) if tokens else None
            regions, *_ = _lowered(
                model, submodule, n_bits, lengths, heads, calibration, p_error, seed, passes
            )
            for cost in _costs(regions, [None] * len(regions)):
                _say(cost.line())
            show("compiling")
            found = Report(_costs(regions, [_facts(region, backend) for region in regions]))
    if as_json:
        _print_json(found.as_dict())
    else:
        _print(str(found))


def _facts(region: Region, backend: str) -> CircuitFacts | None:
    """Compile a region, and return what its compiler says it costs."""
    from fhe_fx.backends import get_backend

    if backend == "concrete":
        return region.circuit().facts  # which knows what to advise where it fails
    return get_backend(backend).compile(region.program).facts


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
        "passphrase": _passphrase(passphrase_file),
        "keys": keys,
    }
    with _progress(f"connecting to {server}") as show:
        access["on_stage"] = show
        if prompt is not None:
            text = _interruptibly(lambda: _write_on(directory, server, prompt, new_tokens, access))
            _print(text)
            return
        results = _interruptibly(lambda: _run_there(directory, server, inputs or [], access))
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

    with load_artifact(directory) as artifact, _progress(f"running, mode {mode}"):
        n_results = len(artifact.codec.results)
        if output and len(output) != n_results:
            raise OptionsError(f"{len(output)} --output given; the circuit has {n_results}.")
        given = [_array(path) for path in inputs]
        artifact.codec.check(given)
        if mode != "execute":
            return artifact.clear(given) if mode == "clear" else artifact.simulate(given)
        _say(Report.from_costs([artifact.manifest["cost"]]).regions[0].line())
        circuit = artifact.circuit()
        _interruptibly(lambda: _prepare_keys(circuit, keys))
        return _interruptibly(lambda: artifact.execute(given))


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

    from fhe_fx.export.pretrained import client_directory
    from fhe_fx.serving.client import from_pretrained

    model: Any = from_pretrained(directory, remote=server, **access)
    tokenizer = AutoTokenizer.from_pretrained(client_directory(directory))
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, given["input_ids"].shape[1] :]))


def _array(path: Path) -> Tensor:
    import torch

    from fhe_fx.errors import CalibrationError
    from fhe_fx.export.models import load_array

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
            _say(f"{output[number]}: {array.dtype} {list(array.shape)}")
        else:
            _print(np.array2string(array, precision=4, suppress_small=True, threshold=200))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    submodule: Submodule = None,
    n_bits: NBits = 4,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Lengths of circuits, as in 4,8,16; by default as the text needs, to 16."
        ),
    ] = None,
    heads: Heads = None,
    mode: Annotated[str, typer.Option(help="clear, simulate or execute.")] = "clear",
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to write at most.")] = 5,
    temperature: Annotated[
        float, typer.Option(help="Draw tokens; 0 takes the most likely one.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most likely; 0 from all.")] = 0,
    outgrown: Annotated[
        str,
        typer.Option(help="A text longer than the longest circuit: error, or slide a window."),
    ] = "error",
    calibration: Calibration = None,
    p_error: PError = None,
    seed: Annotated[int, typer.Option(help="Of draws, random weights, sampled calibration.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Let a model write while a part of it runs on integers, with noise, or encrypted.

    Tokens go to standard output as they come. What will run is said before, with its cost.
    """
    import fhe_fx
    from fhe_fx.api import encrypted_modules
    from fhe_fx.errors import did_you_mean
    from fhe_fx.runtime.generate import Sampling, lengths_for, plan_generation, rows_read
    from fhe_fx.runtime.ranges import range_warnings

    modes = ("clear", "simulate", "execute")
    if mode not in modes:
        raise OptionsError(
            f"--mode {mode!r} is not one of {', '.join(modes)}.{did_you_mean(mode, list(modes))}"
        )
    Sampling(temperature, top_k, seed)
    with _progress("loading the model") as show:
        named = _language_model(model, seed)
        tokenizer = named.tokenizer()
        ids = tokenizer(prompt)["input_ids"]
        lengths = _lengths(tokens) if tokens else lengths_for(len(ids), max_new_tokens)
        rows_read(len(ids), max_new_tokens, max(lengths), outgrown)
        show("lowering the model")
        encrypted = _encrypted(named, submodule, n_bits, lengths, heads, calibration, p_error, seed)
        if mode != "clear":
            show("compiling")
            fhe_fx.compile(encrypted)
    fhe_fx.set_mode(encrypted, mode)
    watches = [part.region.watched() for part in encrypted_modules(encrypted)]
    plan = plan_generation(encrypted, len(ids), max_new_tokens, outgrown)
    _say(str(plan) + _time_of(plan.complexity if mode == "execute" else None))
    stream = fhe_fx.generate(
        encrypted,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        outgrown=outgrown,
    )
    steps = _interruptible_steps(stream) if mode == "execute" else stream
    written = []
    text = _Written(tokenizer, ids, is_shown=not as_json)
    for token in steps:
        written.append(token)
        text.add(token.id)
    text.end()
    for warning in range_warnings(use for watch in watches for use in watch.uses.values()):
        _say(f"warning: {warning}")
    if as_json:
        _print_json(
            {
                "prompt": prompt,
                "text": text.new,
                "mode": mode,
                "tokens": [
                    {**vars(token), "text": tokenizer.decode([token.id])} for token in written
                ],
                "report": fhe_fx.report(encrypted).as_dict(),
            }
        )


def _language_model(model: str, seed: int) -> NamedModel:
    from fhe_fx.export.models import ModelError, load_model

    named = load_model(model, seed)
    if named.module is None:
        raise ModelError(f"{model} is an exported program; give the model that it was.")
    return named


def _lengths(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(n) for n in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise OptionsError(f"--tokens {text!r} is not a list of lengths. Write 8, or 4,8,16.")
    return found


def _encrypted(
    named: NamedModel,
    submodule: str | None,
    n_bits: int,
    lengths: tuple[int, ...],
    heads: str | None,
    calibration: Path | None,
    p_error: float | None,
    seed: int,
) -> Any:
    import fhe_fx
    from fhe_fx.export.models import load_calibration

    if submodule is None:
        raise OptionsError("Give the part to encrypt: --submodule h.0.attn")
    assert named.module is not None
    return fhe_fx.encrypt_submodule(
        named.module,
        submodule,
        max_tokens=lengths,
        heads=_head_numbers(heads),
        calibration=load_calibration(calibration, named) if calibration else None,
        options=_options(n_bits, seed, p_error),
        cache=_cache(),
    )


def _options(n_bits: int, seed: int, p_error: float | None) -> Any:
    from fhe_fx.options import Options

    if p_error is None:
        return Options(n_bits=n_bits, seed=seed)
    return Options(n_bits=n_bits, seed=seed, p_error=p_error)


def _time_of(complexity: float | None) -> str:
    from fhe_fx.report.machine import bootstrap_rate

    return "" if complexity is None else f"; about {complexity / bootstrap_rate()[0]:.0f} s here"


def _interruptible_steps(stream: Iterator[T]) -> Iterator[T]:
    end = object()
    while (step := _interruptibly(lambda: next(stream, end))) is not end:
        yield step  # type: ignore[misc]


class _Written:
    """Text as it is written; a character that takes several tokens is shown when it is whole."""

    def __init__(self, tokenizer: Any, prompt: list[int], *, is_shown: bool) -> None:
        self.tokenizer, self.ids, self.is_shown = tokenizer, list(prompt), is_shown
        self.start = self.shown = self._decoded()
        self._show(self.shown)

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if self.is_shown:
            sys.stdout.write(text)
            sys.stdout.flush()

    def add(self, token: int) -> None:
        self.ids.append(token)
        text = self._decoded()
        if not text.endswith("\ufffd"):
            self._show(text[len(self.shown) :])
            self.shown = text

    def end(self) -> None:
        text = self._decoded()
        self._show(text[len(self.shown) :] + "\n")
        self.shown = text

    @property
    def new(self) -> str:
        return self._decoded()[len(self.start) :]


@app.command()
def evaluate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory of results; what it holds is not redone.")],
    submodule: Submodule = None,
    n_bits: Annotated[str, typer.Option(help="Settings, as in 4, 2,4,6 or 2..8.")] = "4",
    tokens: Annotated[int, typer.Option(help="Rows of the circuit.")] = 8,
    heads: Heads = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Sentences, one a line; else the model writes its own."),
    ] = None,
    long: Annotated[
        str, typer.Option(help="What to do with longer lines: cut, split or error.")
    ] = "cut",
    sentences: Annotated[int, typer.Option(help="How many sentences the model writes.")] = 80,
    modes: Annotated[
        str, typer.Option(help="Some of fake (rounded floats), clear and simulate.")
    ] = "fake,clear,simulate",
    calibration: Calibration = None,
    p_error: PError = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model predicts when a part of it runs on integers, without and with noise.

    Writes evaluation.json and evaluation.csv; where matplotlib is installed, a plot besides.
    """
    from fhe_fx.capture import resolve_targets
    from fhe_fx.evaluate import evaluate_submodule, read_texts
    from fhe_fx.evaluate.arguments import parse_bits, parse_modes
    from fhe_fx.evaluate.plot import can_plot, plot_accuracy
    from fhe_fx.export.models import load_calibration

    bits, stages, chosen = parse_bits(n_bits), parse_modes(modes), _head_numbers(heads)
    if submodule is None:
        raise OptionsError("Give the part to encrypt: --submodule h.0.attn")
    options = _options(bits[0], seed, p_error)
    with _progress("loading the model") as show:
        named = _language_model(model, seed)
        assert named.module is not None
        resolve_targets(named.module, submodule)
        found = evaluate_submodule(
            named.module,
            submodule,
            n_bits=bits,
            tokens=tokens,
            heads=chosen,
            data=read_texts(data, named.tokenizer(), tokens, long) if data else None,
            sentences=sentences,
            calibration=load_calibration(calibration, named) if calibration else None,
            stages=stages,
            options=options,
            out=out,
            name=model,
            on_progress=show,
        )
        show("writing results")
        files = found.write(out)
        if can_plot():
            files += plot_accuracy(found, out)
    for note in found.notes:
        _say(f"note: {note}")
    for warning in found.all_warnings():
        _say(f"warning: {warning}")
    if as_json:
        _print_json(found.as_dict())
    else:
        _print(found.table())
    _say(f"wrote {', '.join(str(f) for f in files)}")
    if not can_plot():
        _say("note: no plot was made; matplotlib is missing: pip install 'fhe_fx[plots]'")


@app.command()
def inspect(
    model: Model,
    submodule: Submodule = None,
    n_bits: NBits = 4,
    tokens: Annotated[int, typer.Option(help="Rows of the circuit.")] = 8,
    heads: Heads = None,
    data: Annotated[
        Path | None, typer.Option(help="Sentences, one a line; else the model writes its own.")
    ] = None,
    sentences: Annotated[int, typer.Option(min=1, help="How many the model writes.")] = 40,
    mode: Annotated[
        str, typer.Option(help="clear, or simulate: with the noise of encryption.")
    ] = "clear",
    threshold: Annotated[
        float, typer.Option(help="Relative error from which a node is pointed out.")
    ] = 0.1,
    html: Annotated[Path | None, typer.Option(help="A page to write, with the graph.")] = None,
    graph: Annotated[
        Path | None, typer.Option(help="A page as of `fhe-fx graph`, coloured by error.")
    ] = None,
    calibration: Calibration = None,
    p_error: PError = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show float beside integer at every node: where the error comes from, and the cost."""
    import fhe_fx
    from fhe_fx.errors import did_you_mean
    from fhe_fx.evaluate.texts import read_texts, sample_texts
    from fhe_fx.inspection.inspect import MODES

    if mode not in MODES:
        raise OptionsError(
            f"--mode {mode!r} is not one of {', '.join(MODES)}.{did_you_mean(mode, MODES)}"
        )
    for option, place in (("html", html), ("graph", graph)):
        if place is not None and not place.parent.is_dir():
            raise OptionsError(f"--{option} {place}: there is no directory {place.parent}.")
    with _progress("loading the model") as show:
        named = _language_model(model, seed)
        assert named.module is not None
        rows = (
            list(read_texts(data, named.tokenizer(), tokens).rows)
            if data
            else sample_texts(named.module, sentences, tokens, seed + 1, on_progress=show)
        )
        show("lowering the model")
        encrypted = _encrypted(
            named, submodule, n_bits, (tokens,), heads, calibration, p_error, seed
        )
        inputs = [{"input_ids": row[None]} for row in rows]
        found = fhe_fx.inspect(encrypted, inputs, mode=mode, threshold=threshold, on_progress=show)
    for warning in found.warnings:
        _say(f"warning: {warning}")
    if as_json:
        _print_json(found.as_dict())
    else:
        _print(str(found))
    if html is not None:
        _say(f"wrote {found.save_html(html)}")
    if graph is not None:
        graph.write_text(_graph_of(encrypted, found), encoding="utf-8")
        _say(f"wrote {graph}")


def _graph_of(encrypted: Any, found: Inspection) -> str:
    """Return the page of a part's graph, with the errors and the outliers of an inspection."""
    from fhe_fx.api import encrypted_modules
    from fhe_fx.ir.snapshot import snapshot
    from fhe_fx.report.page import Measure, to_page

    (module,), (region,) = encrypted_modules(encrypted), found.regions
    errors = {n.node: n.relative_error for n in region.nodes if isfinite(n.relative_error)}
    outside = {n.node: 100 * n.outside_share for n in region.nodes}
    measures = [Measure("relative error", errors), Measure("out of range", outside, " %")]
    last = {"pass": list(module.region.pipeline)[-1].text()}
    shot = {**last, **snapshot(module.region.program)}
    return to_page([shot], title=region.name, measures=measures)


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

    passphrase = _passphrase(passphrase_file)
    with _progress("making keys") as show:
        all_made = _interruptibly(lambda: make_keys(client, keys, passphrase, show))
    how = "encrypted under the passphrase" if passphrase else "readable by you alone"
    for made in all_made:
        size = _size(made.evaluation.stat().st_size)
        _print(f"{made.secret}: secret keys, {how}; never give them away")
        _print(f"{made.evaluation}: {size} for the server, id {made.id}")


def _passphrase(file: Path | None) -> str | None:
    if file is None:
        return None
    if not (text := file.read_text(encoding="utf-8").strip()):
        raise OptionsError(f"{file} holds no passphrase.")
    return text


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
    _print(url)
    sys.stdout.flush()


@app.command()
def passes(
    pipeline: Annotated[
        str | None, typer.Argument(help="As --passes takes it; without it, the default pipeline.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List a pipeline in order, with the law of each pass, and check that it can run."""
    chosen = _pipeline(pipeline)
    chosen.check()
    rows = [
        {
            "name": p.name,
            "law": p.law(),
            "requires": sorted(p.requires),
            "gives": sorted(p.gives),
            "breaks": sorted(p.breaks),
        }
        for p in chosen
    ]
    if as_json:
        _print_json({"passes": rows})
        return
    for number, row in enumerate(rows, 1):
        _print(f"{number:2}  {row['name']}\n    {row['law']}")
        for key in ("requires", "gives", "breaks"):
            if row[key]:
                _print(f"    {key} {', '.join(row[key])}")


@app.command()
def graph(
    source: Annotated[str, typer.Argument(help="What export or FHE_FX_DUMP wrote, or a MODEL.")],
    html: Annotated[Path | None, typer.Option(help="A page to write: all steps, folded.")] = None,
    svg: Annotated[Path | None, typer.Option(help="A picture to write of the last step.")] = None,
    level: Annotated[str, typer.Option(help="Of the picture: modules, lines or nodes.")] = "nodes",
    submodule: Submodule = None,
    n_bits: NBits = 4,
    tokens: Tokens = None,
    heads: Heads = None,
    calibration: Calibration = None,
    p_error: PError = None,
    seed: Seed = 0,
    passes: Passes = None,
) -> None:
    """Draw the graph of an encrypted part, before and after each pass."""
    from fhe_fx.export.artifact import read_drawn
    from fhe_fx.export.manifest import MANIFEST
    from fhe_fx.report.page import LEVELS, read_snapshots, to_page, to_svg

    if html is None and svg is None:
        raise OptionsError("Give what to write: --html out.html, --svg out.svg, or both.")
    if level not in LEVELS:
        raise OptionsError(f"--level {level!r} is not one of {', '.join(LEVELS)}.")
    if submodule is None and (Path(source) / MANIFEST).is_file():
        snapshots = [read_drawn(source)]
    elif submodule is None:
        snapshots = read_snapshots(Path(source))
    else:
        with _progress("loading and lowering the model"), _dumping() as dump:
            lengths = (tokens,) if tokens else None
            _lowered(
                source, [submodule], n_bits, lengths, heads, calibration, p_error, seed, passes,
                is_one=True,
            )  # fmt: skip
            snapshots = read_snapshots(dump)
    if html is not None:
        html.write_text(to_page(snapshots), encoding="utf-8")
        _say(f"{html}: {len(snapshots)} steps, {_size(html.stat().st_size)}")
    if svg is not None:
        svg.write_text(to_svg(snapshots[-1], level), encoding="utf-8")
        _say(f"{svg}: {_size(svg.stat().st_size)}")


@contextmanager
def _dumping() -> Iterator[Path]:
    """Let lowerings be dumped, to where FHE_FX_DUMP says or to a place that is removed again."""
    with tempfile.TemporaryDirectory(prefix="fhe_fx-") as directory:
        held = os.environ.get(_DUMP)
        os.environ[_DUMP] = held or directory
        try:
            yield Path(os.environ[_DUMP])
        finally:
            if held is None:
                del os.environ[_DUMP]


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A directory that FHE_FX_DUMP wrote.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Compare two compilations node by node; the exit code is 1 if they differ."""
    from fhe_fx.report.difference import compare_snapshots
    from fhe_fx.report.page import read_snapshots

    found = compare_snapshots(read_snapshots(first)[-1], read_snapshots(second)[-1])
    _print(str(found))
    if found.changes:
        raise typer.Exit(1)


def _plugins() -> list[str]:
    """Load every plugin, and list those that work and those that do not."""
    from fhe_fx import plugins
    from fhe_fx.backends import backend_names
    from fhe_fx.passes import registered
    from fhe_fx.passes.lowerings.registry import load_lowerings

    registered()
    load_lowerings()
    backend_names()
    working = [f"{p}: {p.name} of {p.group}" for p in plugins.loaded()]
    return working + [f"{f.plugin}: {f.plugin.name}, left out" for f in plugins.faults()]


class _CacheAction(str, Enum):
    show, path, clear = "show", "path", "clear"


@app.command()
def cache(
    action: Annotated[_CacheAction, typer.Argument(help="What to do.")] = _CacheAction.show,
    as_json: AsJson = False,
) -> None:
    """Show what lowering keeps on disk, print where, or remove it.

    FHE_FX_CACHE names the directory, or says off; FHE_FX_CACHE_GB bounds it.
    """
    kept = _cache()
    if kept is None:
        _say(f"Nothing is kept: {_CACHE}={os.environ[_CACHE]}.")
        return
    if action is _CacheAction.path:
        _print(str(kept.directory))
        return
    entries = kept.entries()
    if action is _CacheAction.clear:
        _say(f"removed {len(entries)} entries, {_size(kept.clear())}, of {kept.directory}")
        return
    held = sum(entry.bytes for entry in entries)
    if as_json:
        rows = [{"what": e.what, "bytes": e.bytes, "used": e.used} for e in entries]
        directory = str(kept.directory)
        bound = kept.most_bytes
        _print_json({"directory": directory, "bytes": held, "bound": bound, "entries": rows})
        return
    _print(f"{kept.directory}: {_size(held)} of {_size(kept.most_bytes)}")
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        _print(f"  {used}  {_size(entry.bytes):>8}  {entry.what}")


@app.command()
def doctor(
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Do not run look-ups to measure their rate.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, what this machine is, and how fast it runs look-ups."""
    from fhe_fx.report.machine import machine_facts, store_rate

    facts = machine_facts() | {"plugins": _plugins()}
    if not no_measure:
        with _progress("running 128 look-ups of 6 bits, encrypted"):
            from fhe_fx.backends.concrete.benchmark import measure_look_ups

            found = measure_look_ups()
        facts |= {
            "rate": found.rate,
            "rate_is_measured": True,
            "measured_look_ups": found.look_ups,
            "measured_bits": found.bits,
            "measured_seconds": found.seconds,
            "keygen_seconds": found.keygen_seconds,
            "rate_file": str(store_rate(found.rate)),
        }
    if as_json:
        _print_json(facts)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            shown = "\n".join(value) or "none"
        table.add_row(Text(key.replace("_", " ")), Text(shown))
    Console(highlight=False).print(table)

"""`fhe-fx export`: the files of client and server, and ONNX models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fhe_fx.cli.command import app
from fhe_fx.cli.lowering import artefacts, costs_of, lowered
from fhe_fx.cli.options import (
    AsJson,
    Calibration,
    ClearInputs,
    Heads,
    Lengths,
    MaxCost,
    MaxError,
    Model,
    NBits,
    Passes,
    PError,
    Rules,
    Seed,
    Submodules,
    TargetAgreement,
    budget_of,
    lengths_of,
)
from fhe_fx.cli.talk import print_json, print_text, progress, say, size_of
from fhe_fx.errors import OptionsError

if TYPE_CHECKING:
    from fhe_fx.export.models import NamedModel
    from fhe_fx.runtime.region import Region

__all__ = ["export"]


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
    clear_input: ClearInputs = None,
    calibration: Calibration = None,
    p_error: PError = None,
    max_error: MaxError = None,
    max_cost: MaxCost = None,
    target_agreement: TargetAgreement = None,
    rule: Rules = None,
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
    from fhe_fx.export import FILES, check_apart, check_destination, export_region, save
    from fhe_fx.ir.program import Program

    budget = budget_of(p_error, max_error, max_cost, target_agreement, rule)
    if out is None and onnx is None:
        raise OptionsError("Give where to write: --out DIR, --onnx DIR, or both.")
    if out is not None:
        check_destination(out, FILES)
    if onnx is not None:
        _check_onnx(onnx)
    lengths = lengths_of(tokens) if tokens else None
    accuracy = card_figures(evaluation, n_bits) if evaluation else None
    with progress("loading and lowering the model") as show:
        regions, whole, named = lowered(
            model, submodule, n_bits, lengths, heads, calibration, budget, seed, passes,
            is_one=circuit_only or onnx is not None, clear_inputs=clear_input,
        )  # fmt: skip
        for cost in costs_of(regions, [None] * len(regions)):
            say(cost.line())
        onnx_manifest = _export_onnx(whole, regions[0], onnx, model, show) if onnx else None
        if out is None:
            if as_json:
                print_json({"onnx": str(onnx), **(onnx_manifest or {})})
            return
        if not (isinstance(whole, Program) or circuit_only):
            check_apart(whole)
        show("compiling")
        for cost in costs_of(regions, [region.circuit().facts for region in regions]):
            say(cost.line())
        told: dict[str, Any] = {"validate": not no_validate, "origin": model, "on_stage": show}
        if isinstance(whole, Program) or circuit_only:
            export_region(regions[0], out, **told)
        else:
            tokenizer = _tokenizer_if_any(named)
            save(whole, out, tokenizer=tokenizer, accuracy=accuracy, **told)
    if as_json:
        summary = _export_summary(out)
        print_json(summary | ({"onnx": str(onnx)} if onnx else {}))
        return
    sizes = [f"{party} {size_of(_bytes_of(out / party))}" for party in ("client", "server")]
    print_text(f"{out}: {', '.join(sizes)}")
    written = artefacts(out)
    for manifest in written:
        if manifest["validation"]:
            name = _of_several(manifest) if len(written) > 1 else ""
            print_text(name + _validation_line(manifest["validation"]))


def _of_several(manifest: dict[str, Any]) -> str:
    tokens = manifest["cost"]["tokens"]
    return f"{manifest['name']}{'' if tokens is None else f' at {tokens} tokens'}: "


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
    sizes = [f"{name} {size_of(file['bytes'])}" for name, file in manifest["files"].items()]
    say(f"{directory}: {', '.join(sizes)}")
    say(
        f"validated in ONNX Runtime: integers equal on {checked['samples']} samples, floats within "
        f"{checked['float_error']:.1g} of the largest"
    )
    return manifest


def _export_summary(out: Path) -> dict[str, Any]:
    """Describe an export of one circuit; or of several, under `circuits`."""
    from fhe_fx.export import read_stated

    summaries = [_circuit_summary(manifest) for manifest in artefacts(out)]
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

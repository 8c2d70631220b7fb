"""`fhe-fx report`: what circuits cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from fhe_fx.cli.talk import print_json, print_text, progress, say
from fhe_fx.errors import OptionsError

if TYPE_CHECKING:
    from fhe_fx.backends import CircuitFacts
    from fhe_fx.runtime.region import Region

__all__ = ["report"]


@app.command()
def report(
    model: Annotated[str, typer.Argument(help="A directory that export wrote, or a MODEL.")],
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
    passes: Passes = None,
    backend: Annotated[
        str, typer.Option(help="Who compiles, and says what it costs.")
    ] = "concrete",
    as_json: AsJson = False,
) -> None:
    """Say what each circuit costs, look-up by look-up."""
    from fhe_fx.backends import get_backend
    from fhe_fx.export import MANIFEST
    from fhe_fx.report import Report

    budget = budget_of(p_error, max_error, max_cost, target_agreement, rule)
    if (Path(model) / MANIFEST).is_file():
        found = Report.from_costs([manifest["cost"] for manifest in artefacts(Path(model))])
    elif not submodule:
        raise OptionsError(
            f"{model} holds no {MANIFEST}, so it is read as a MODEL; then give --submodule too."
        )
    else:
        get_backend(backend)  # known before the work begins, or an error
        with progress("loading and lowering the model") as show:
            lengths = lengths_of(tokens) if tokens else None
            regions, *_ = lowered(
                model, submodule, n_bits, lengths, heads, calibration, budget, seed, passes,
                clear_inputs=clear_input,
            )  # fmt: skip
            for cost in costs_of(regions, [None] * len(regions)):
                say(cost.line())
            show("compiling")
            found = Report(costs_of(regions, [_facts(region, backend) for region in regions]))
    if as_json:
        print_json(found.as_dict())
    else:
        print_text(str(found))


def _facts(region: Region, backend: str) -> CircuitFacts | None:
    """Compile a region, and return what its compiler says it costs."""
    from fhe_fx.backends import facts_by

    if backend == "concrete":
        return region.circuit().facts  # which knows what to advise where it fails
    return facts_by(backend, region.program)

"""From a model's name and the words of a command to circuits, and what they cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fhe_fx.cli.options import head_numbers, options_of, parts_of
from fhe_fx.errors import OptionsError, TargetError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fhe_fx.backends import CircuitFacts
    from fhe_fx.export.cache import Cache
    from fhe_fx.export.models import NamedModel
    from fhe_fx.ir.program import Program
    from fhe_fx.passes import Pipeline
    from fhe_fx.report import RegionCost
    from fhe_fx.runtime.region import Region

__all__ = [
    "CACHE",
    "DUMP",
    "artefacts",
    "costs_of",
    "encrypted_model",
    "kept_cache",
    "language_model",
    "lowered",
    "only_part",
    "pipeline_of",
]

DUMP = "FHE_FX_DUMP"
"""Environment variable: a directory for the print and the data after each pass."""
CACHE, _CACHE_GB = "FHE_FX_CACHE", "FHE_FX_CACHE_GB"
"""Environment variables: a directory for what was lowered, or `off`; its bound."""


def pipeline_of(passes: str | None) -> Pipeline:
    """Return the pipeline of `--passes`, which dumps where FHE_FX_DUMP says."""
    from fhe_fx.extend import parse_pipeline, read_pipeline
    from fhe_fx.passes import default_pipeline

    dump_dir = Path(os.environ[DUMP]) if os.environ.get(DUMP) else None
    if passes is None:
        return default_pipeline().dumping(dump_dir)
    read = read_pipeline(Path(passes)) if passes.endswith(".toml") else parse_pipeline(passes)
    return read.dumping(dump_dir)


def kept_cache() -> Cache | None:
    """Return where lowered programs are kept, or None if they are not."""
    from fhe_fx.export.cache import MOST_BYTES, Cache, cache_directory

    place = os.environ.get(CACHE, "")
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


def lowered(
    model: str,
    submodules: list[str] | None,
    n_bits: int,
    lengths: tuple[int, ...] | None,
    heads: str | None,
    calibration: Path | None,
    budget: Mapping[str, Any],
    seed: int,
    passes: str | None = None,
    *,
    is_one: bool = False,
    clear_inputs: Sequence[str] | None = None,
) -> tuple[list[Region], nn.Module | Program, NamedModel]:
    """Load a model and lower parts of it; with `is_one`, refuse more than one circuit before.

    Returns:
        A region for each circuit; the model that they stand in, or the exported graph; what was
        loaded.
    """
    from fhe_fx.capture import graph_of_exported, is_model_itself
    from fhe_fx.export.models import load_calibration, load_model

    submodules = parts_of(submodules)
    chosen, pipeline = head_numbers(heads), pipeline_of(passes)
    pipeline.check()
    options = options_of(n_bits, seed, budget)
    named = load_model(model, seed)
    is_by_name = bool(clear_inputs) or (calibration is not None and calibration.suffix == ".npz")
    if named.exported is not None and (is_by_name or is_model_itself(submodules)):
        named = replace(named, module=graph_of_exported(named.exported), exported=None)
    samples = load_calibration(calibration, named) if calibration is not None else None
    if named.exported is not None:
        graph, region = _exported_region(
            named.exported, submodules, lengths, chosen, samples, options, pipeline, kept_cache()
        )
        return [region], graph, named
    from torch import fx

    import fhe_fx
    from fhe_fx.api import encrypted_modules
    from fhe_fx.capture import resolve_targets, submodules_of
    from fhe_fx.export.graph_inputs import inputs_of_graph

    assert named.module is not None
    module = named.module
    if isinstance(module, fx.GraphModule):
        module, submodules = submodules_of(module, submodules)
        inputs = inputs_of_graph(module)
        _check_fixed(lengths, [tuple(x.shape) for x in inputs.values()])
        if samples is None:
            raise OptionsError(
                f"{model} is run as a graph, which writes no calibration inputs of its own. Give "
                f"them: --calibration x.npy, an array [n, *input shape], or a .npz with an array "
                f"for each of {', '.join(inputs)}."
            )
    _with_masks(module, clear_inputs)
    paths = resolve_targets(module, submodules)
    if is_one:
        only_part(paths)
        if len(lengths or ()) > 1:
            raise OptionsError(f"--tokens {','.join(map(str, lengths or ()))}: give one length.")
    encrypted = fhe_fx.encrypt_submodule(
        module,
        submodules,
        n_bits=n_bits,
        max_tokens=lengths,
        heads=chosen,
        clear_inputs=clear_inputs or (),
        calibration=samples,
        options=options,
        passes=pipeline,
        cache=kept_cache(),
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
    path = only_part([path for s in submodules for path in exported_targets(whole, s)])
    _check_fixed(lengths, [d.shape_of(n) for n in whole.placeholders])
    lower = run_pipeline if cache is None else cache.lowered
    region = exported_region(whole, path, heads, samples, pipeline, options, lower)
    return whole, region


def _check_fixed(lengths: tuple[int, ...] | None, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse another length than a graph has."""
    if lengths is None or {s[1] for s in shapes if len(s) > 1}.issuperset(lengths):
        return
    asked = ",".join(map(str, lengths))
    raise OptionsError(
        f"--tokens {asked}: the graph takes {' and '.join(str(list(s)) for s in shapes)}, and "
        f"shapes are fixed in a .pt2 or .onnx. Leave --tokens out, or export with {asked} tokens."
    )


def only_part(paths: list[str]) -> str:
    """Return the only one of the parts that `--submodule` names.

    Raises:
        TargetError: if it names several.
    """
    if len(paths) > 1:
        raise TargetError(
            f"--submodule names {len(paths)} parts: {', '.join(paths[:8])}. Give one here."
        )
    return paths[0]


def _with_masks(module: nn.Module, clear_inputs: Sequence[str] | None) -> None:
    """Let a model of transformers always make its mask: not all do of one that hides nothing."""
    choose: Any = getattr(module, "set_attn_implementation", None)
    if clear_inputs and choose is not None:
        choose("eager")


def language_model(model: str, seed: int, clear_inputs: Sequence[str] | None = None) -> NamedModel:
    """Load a model that is a module; with clear inputs, it makes its masks always.

    Raises:
        ModelError: if it is a graph, or there is none.
    """
    from torch import fx

    from fhe_fx.export.models import ModelError, load_model

    named = load_model(model, seed)
    if named.module is None or isinstance(named.module, fx.GraphModule):
        raise ModelError(
            f"{model} holds a graph, which has one length and no tokenizer; give the language "
            f"model that it was."
        )
    _with_masks(named.module, clear_inputs)
    return named


def encrypted_model(
    named: NamedModel,
    submodules: list[str],
    n_bits: int,
    lengths: tuple[int, ...],
    heads: str | None,
    calibration: Path | None,
    budget: Mapping[str, Any],
    seed: int,
    clear_inputs: Sequence[str] | None = None,
) -> Any:
    """Return a language model with parts encrypted, for each of some lengths."""
    import fhe_fx
    from fhe_fx.export.models import load_calibration

    assert named.module is not None
    return fhe_fx.encrypt_submodule(
        named.module,
        submodules,
        max_tokens=lengths,
        heads=head_numbers(heads),
        clear_inputs=clear_inputs or (),
        calibration=load_calibration(calibration, named) if calibration else None,
        options=options_of(n_bits, seed, budget),
        cache=kept_cache(),
    )


def costs_of(regions: list[Region], facts: Sequence[CircuitFacts | None]) -> tuple[RegionCost, ...]:
    """Return what circuits cost; the length of each where a part has several."""
    from fhe_fx.report import report_on

    lengths = [r.tokens if _has_others(r, regions) else None for r in regions]
    programs = [region.program for region in regions]
    return report_on(list(zip(programs, facts, strict=True)), lengths).regions


def _has_others(region: Region, regions: list[Region]) -> bool:
    """Say whether a part has circuits of several lengths."""
    return sum(r.circuit_name == region.circuit_name for r in regions) > 1


def artefacts(out: Path) -> list[dict[str, Any]]:
    """Read the manifests of the circuits in a directory that an export wrote, of one or several."""
    from fhe_fx.export import read_artefacts

    return read_artefacts(out, check_versions=False)

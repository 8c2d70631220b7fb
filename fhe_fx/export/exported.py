"""A region out of a `.pt2` exported program, for which there is no module to put back.

`encrypt_submodule` needs the module and its calls; here the graph's own record of submodules
(`nn_module_stack`) is all there is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fhe_fx.capture import program_of, resolve_targets
from fhe_fx.capture.export import check_static
from fhe_fx.errors import CalibrationError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program
from fhe_fx.options import Options
from fhe_fx.passes import Annotate, Partition, Pipeline
from fhe_fx.passes.normalize import Normalize
from fhe_fx.passes.partition import ENCRYPTED
from fhe_fx.quant.calibration import check_calibration
from fhe_fx.runtime.lower import Lowerer, inputs_of_region, lower_region, run_pipeline
from fhe_fx.runtime.region import Region

__all__ = ["exported_region", "exported_targets", "open_exported"]


def open_exported(exported: torch.export.ExportedProgram) -> Program:
    """Turn an exported program into the form that passes take.

    Raises:
        CaptureError: if its shapes are dynamic.
    """
    whole = program_of(exported, "ExportedProgram")
    for node in whole.placeholders:
        check_static(node.name, node.meta["val"])
    return whole


def exported_targets(whole: Program, target: str) -> list[str]:
    """Return the submodules of an exported program that `target` names.

    Raises:
        TargetError: as `fhe_fx.capture.resolve_targets`.
    """
    root: nn.Module = type(whole.name, (nn.Module,), {})()
    paths = {p for n in whole.graph.nodes for p in n.meta.get("module_stack", ()) if p}
    for path in sorted(paths):
        holder = root
        for name in path.split("."):
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
    return resolve_targets(root, target)


def exported_region(
    whole: Program,
    path: str,
    heads: Sequence[int] | None,
    calibration: Sequence[Tensor] | None,
    pipeline: Pipeline,
    options: Options,
    lower: Lowerer = run_pipeline,
) -> Region:
    """Cut a submodule out of an exported program and lower it to integers.

    Args:
        whole: what `open_exported` returned; left as it is.
        path: dotted path of the submodule.
        heads: heads to encrypt, or None for all of it.
        calibration: values of the program's only input, or None if it can write its own.
        pipeline: lowers the region.
        options: how.
        lower: runs the pipeline, or knows what it makes.

    Raises:
        CalibrationError: if calibration values are missing, or have another shape.
        CaptureError: if the submodule is not one region of the graph.
    """
    inputs = _inputs(whole, calibration, options)
    target = Program(copy.deepcopy(whole.module), name=path, options=options)
    Pipeline((Annotate(path), Partition())).run(target)
    composed = target.module
    target.module = composed.get_submodule(ENCRYPTED)  # type: ignore[assignment]
    target.properties = {"captured"}
    target.samples = inputs_of_region(composed, inputs)
    Pipeline((Normalize(),)).run(target)
    return lower_region(target, heads, pipeline, lower)


# Calibration ----------------------------------------------------------------------------------


def _inputs(
    whole: Program, calibration: Sequence[Tensor] | None, options: Options
) -> list[tuple[Tensor, ...]]:
    if calibration is None:
        return [(x,) for x in _sampled(whole, options)]
    if len(whole.placeholders) != 1:
        raise CalibrationError(
            f"The exported program takes {len(whole.placeholders)} tensors; calibration from a "
            f"file needs a program of one. Export the model with one input."
        )
    check_calibration(calibration)
    node = whole.placeholders[0]
    shape, dtype = d.shape_of(node), node.meta["val"].dtype
    rows = [x if tuple(x.shape) == shape else x[None] for x in calibration]
    if wrong := [x for x in rows if tuple(x.shape) != shape]:
        raise CalibrationError(
            f"A calibration input has shape {list(wrong[0].shape)}; the exported program takes "
            f"{list(shape)}. Give an array [n, {', '.join(map(str, shape))}]."
        )
    if len(rows) < 2:
        raise CalibrationError(f"{len(rows)} calibration input is too few; some dozens are wise.")
    return [(x.to(dtype),) for x in rows]


def _sampled(whole: Program, options: Options) -> list[Tensor]:
    """Let an exported language model write its own inputs, one token after the other."""
    n_words, result = _vocabulary(whole)
    tokens = d.shape_of(whole.placeholders[0])[1]
    generator = torch.Generator().manual_seed(options.seed)
    sampled = []
    for _ in range(options.n_samples):
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        ids[0, 0] = torch.randint(n_words, (1,), generator=generator)
        for i in range(1, tokens):
            weights = whole(ids)[result][0, i - 1].float().softmax(-1)
            ids[0, i] = torch.multinomial(weights, 1, generator=generator)
        sampled.append(ids)
    return sampled


def _vocabulary(whole: Program) -> tuple[int, int]:
    """Return the number of words, and which result holds a score for each.

    Raises:
        CalibrationError: if the program does not map token numbers to scores of tokens.
    """
    if len(whole.placeholders) == 1:
        node = whole.placeholders[0]
        shape = d.shape_of(node)
        sizes = {
            d.constant(d.input_node(n)).shape[0]
            for n in whole.calls(torch.ops.aten.embedding.default)
            if d.is_encrypted(d.input_node(n, 1)) and d.input_node(n).op == "get_attr"
        }
        is_tokens = not node.meta["val"].is_floating_point() and len(shape) == 2 and shape[0] == 1
        for k, result in enumerate(whole.results):
            scores = d.shape_of(result)
            if is_tokens and scores[:-1] == shape and scores[-1] in sizes:
                return scores[-1], k
    raise CalibrationError(
        "The exported program does not map token numbers [1, tokens] to scores of the same "
        "vocabulary, so it cannot write its own calibration inputs. "
        "Give them: --calibration x.npy, an array [n, *input shape]."
    )

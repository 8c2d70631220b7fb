"""Builds programs from small modules, and checks a whole lowering step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.export.onnx import integer_model
from fhe_fx.export.onnx.model import encoded_name
from fhe_fx.export.onnx.validate import run_model, session
from fhe_fx.ir import Program
from fhe_fx.ir import dialect as d
from fhe_fx.ir.types import ValueType
from fhe_fx.passes import Pass, Pipeline, default_pipeline
from fhe_fx.quant.classes import find_classes
from fhe_fx.quant.rounded import rounded_values
from fhe_fx.testing import Sample, program_from, seeded

__all__ = [
    "Sample",
    "assert_close",
    "decode",
    "encode",
    "lower",
    "lower_with_prediction",
    "onnx_results",
    "program_from",
    "relative_error",
    "run_all",
    "run_integers",
    "seeded",
]


def run_all(program: Program, samples: Sequence[Sample]) -> list[Tensor]:
    """Run a float program: one stack of values for each result."""
    return [torch.stack(r) for r in zip(*[program(*s) for s in samples], strict=True)]


def encode(program: Program, sample: Sample, gain: float = 1.0) -> list[npt.NDArray[np.int64]]:
    """Quantize one real tensor for each original input."""
    encoded = []
    for node in program.placeholders:
        kind: ValueType = node.meta["type"]
        real = sample[program.source_of(node)].double() * gain
        whole = ((real - kind.offset) / kind.scale).round()
        encoded.append(whole.clamp(kind.low, kind.high).long().numpy())
    return encoded


def decode(program: Program, results: Sequence[npt.NDArray[np.int64]]) -> list[Tensor]:
    """Turn integers into real tensors."""
    decoded = []
    for node, q in zip(program.results, results, strict=True):
        kind: ValueType = node.meta["type"]
        decoded.append((torch.from_numpy(q) * kind.scale + kind.offset).view(d.shape_of(node)))
    return decoded


def onnx_results(
    program: Program, encoded: Sequence[npt.NDArray[np.int64]]
) -> list[npt.NDArray[np.int64]]:
    """Run an integer program as an ONNX model, in ONNX Runtime."""
    model = session(integer_model(program).SerializeToString())
    names = map(encoded_name, range(len(encoded)))
    return list(run_model(model, dict(zip(names, encoded, strict=True))).values())


def run_integers(program: Program, samples: Sequence[Sample]) -> list[Tensor]:
    """Run an integer program by the reference: one stack of real values for each result.

    ONNX Runtime must give the same integers on the first sample.
    """
    circuit = ReferenceBackend().compile(program)
    encoded = [encode(program, s) for s in samples]
    found = [circuit.clear(inputs) for inputs in encoded]
    for ours, theirs in zip(found[0], onnx_results(program, encoded[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    runs = [decode(program, results) for results in found]
    return [torch.stack(r) for r in zip(*runs, strict=True)]


def assert_close(expected: Sequence[Tensor], found: Sequence[Tensor], what: str) -> None:
    """Compare up to float rounding, relative to the size of each result."""
    assert len(expected) == len(found), what
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape, f"{what}: {tuple(a.shape)} became {tuple(b.shape)}"
        size = float(a.abs().max()) + 1e-3
        error = float((a - b).abs().max())
        assert error <= 2e-4 * size, f"{what}: differs by {error:.3g}, values up to {size:.3g}"


def lower(program: Program, passes: Sequence[Pass] | Pipeline | None = None) -> list[Tensor]:
    """Run every pass; after each that is exact in float, compare all results with the ones before.

    Returns:
        The results of the given program in float on the samples, one stack each.
    """
    given = expected = run_all(program, program.samples)
    for p in passes if passes is not None else default_pipeline():
        Pipeline((p,)).run(program)
        if "integer" not in program.properties:
            found = run_all(program, program.samples)
            if p.is_exact:
                assert_close(expected, found, p.name)
            expected = found
    return given


def lower_with_prediction(program: Program) -> tuple[list[Tensor], list[float]]:
    """Run every pass, and predict the errors of the results from rounding alone.

    The float program is run with every input, and every value that a look-up reads, rounded to its
    slots, before any integer is made. The widths are those of a given `p_error`, so that ranges are
    chosen for roundings, not for noise that may be several slots.

    Returns:
        The results of the given program in float on the samples, and the relative error of each
        that roundings alone make.
    """
    program.options = dataclasses.replace(program.options, p_error=0.1)
    *before, scales, integers = default_pipeline()
    expected = lower(program, before)
    draws = 4
    rounded = rounded_values(program, find_classes(program), list(program.samples) * draws)
    errors = [
        relative_error(e.repeat(draws, *[1] * (e.dim() - 1)), rounded[node.name])
        for e, node in zip(expected, program.results, strict=True)
    ]
    lower(program, (scales, integers))
    return expected, errors


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Return the rms error in parts of the deviation of the values."""
    error = (expected.double() - found.double()).square().mean().sqrt()
    centre = expected.double() - expected.double().mean()
    return float(error / (centre.square().mean().sqrt() + 1e-6))

"""ONNX Runtime beside PyTorch: integers equal, floats up to the order of additions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from fhe_fx.backends.base import Integers
from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.errors import BackendError
from fhe_fx.export.onnx.model import encoded_name
from fhe_fx.export.onnx.remainder import Half
from fhe_fx.export.onnx.rounding import Rounded, rounded_results
from fhe_fx.ir import dialect as d
from fhe_fx.runtime.codec import Codec, Port
from fhe_fx.runtime.region import Region

__all__ = ["run_model", "validate_models"]

SAMPLES = 4

Arrays = dict[str, npt.NDArray[Any]]


def session(model: bytes) -> onnxruntime.InferenceSession:
    """Load a model on the CPU, without the runtime's own messages."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_model(model: onnxruntime.InferenceSession, values: Arrays) -> Arrays:
    """Run a model on those of `values` that it takes, and return its results by name."""
    given = {i.name: values[i.name] for i in model.get_inputs()}
    names = [o.name for o in model.get_outputs()]
    return dict(zip(names, model.run(names, given), strict=True))


def validate_models(
    region: Region, halves: tuple[Half, Half], before: bytes, after: bytes, integers: bytes
) -> dict[str, Any]:
    """Compare the three models with what they were made from.

    Returns:
        On how many samples integers were equal; the largest difference of floats, in parts of the
        largest value and of what rounding explains; how many of the encoded integers differ, by
        one, because a float lay between two of them.

    Raises:
        BackendError: if an integer result differs, or a float by more than rounding explains.
    """
    first, second = halves
    samples = _check_integers(region, session(integers))
    known = _named(first.inputs, _example(region, first))
    made = _run_half(first, known)
    found = run_model(session(before), known)
    rounded = _rounded(first, known)
    moved = _check_encoded(region, rounded, made, found)
    differences = [_check_floats(region, rounded, made, found)]
    known |= made
    known |= _results(region, [made[n] for n in made if n.startswith("encoded_")])
    made, found = _run_half(second, known), run_model(session(after), known)
    differences.append(_check_floats(region, _rounded(second, known), made, found))
    return {
        "samples": samples,
        "is_integer_equal": True,
        "float_error": max(error for error, _ in differences),
        "float_error_of_allowed": max(part for _, part in differences),
        "encoded_differently": moved,
    }


def _check_integers(region: Region, model: onnxruntime.InferenceSession) -> int:
    """Compare on calibration samples, and on integers far beyond them, which wrap."""
    ports = Codec.of(region.program).inputs
    encoded = [Codec.of(region.program).encode(s) for s in region.captured.samples[:SAMPLES]]
    draw = np.random.default_rng(0)
    encoded += [
        [_drawn(draw, gain * p.type.low, gain * p.type.high, p) for p in ports] for gain in (1, 64)
    ]
    for number, inputs in enumerate(encoded):
        names = map(encoded_name, range(len(inputs)))
        theirs = run_model(model, dict(zip(names, inputs, strict=True)))
        for name, ours in _results(region, inputs).items():
            if not np.array_equal(ours, theirs[name]):
                wrong = int((ours != theirs[name]).sum())
                raise BackendError(
                    f"{region.program.name}: in ONNX Runtime {wrong} of {ours.size} integers of "
                    f"{name} differ from the reference (sample {number}). This is a fault of "
                    f"fhe_fx; report it."
                )
    return len(encoded)


def _drawn(draw: np.random.Generator, low: int, high: int, port: Port) -> Integers:
    return np.asarray(draw.integers(low, high, port.shape, endpoint=True), dtype=np.int64)


def _check_encoded(
    region: Region, rounded: Mapping[str, Rounded], ours: Arrays, theirs: Arrays
) -> int:
    """Return how many encoded integers differ: by one, where a float lies as good as between."""
    moved = 0
    for name in (n for n in ours if n.startswith("encoded_")):
        differs = ours[name] != theirs[name]
        moved += int(differs.sum())
        exact = rounded[name].exact.numpy()[differs]
        worst = np.abs(ours[name] - theirs[name]).max(initial=0)
        from_tie = np.abs(exact - np.floor(exact) - 0.5).max(initial=0.0)
        if worst > 1 or from_tie > rounded[name].bound:
            raise BackendError(
                f"{region.program.name}: ONNX Runtime encodes {int(differs.sum())} of "
                f"{differs.size} numbers of {name} differently from PyTorch, by up to {worst} "
                f"units, for a number {from_tie:.2g} units away from the middle between two "
                f"integers; rounding explains {rounded[name].bound:.2g}. This is a fault of "
                f"fhe_fx; report it."
            )
    return moved


def _check_floats(
    region: Region, rounded: Mapping[str, Rounded], ours: Arrays, theirs: Arrays
) -> tuple[float, float]:
    """Return the largest difference, in parts of the largest value, and of what is allowed."""
    errors, parts = [0.0], [0.0]
    for name in (n for n in ours if "encoded_" not in n):
        error, bound = _difference(ours[name], theirs[name]), rounded[name].bound
        if not error <= bound:
            raise BackendError(
                f"{region.program.name}: ONNX Runtime's {name} differs from PyTorch's by "
                f"{error:.2g}; rounding explains {bound:.2g}. This is a fault of fhe_fx; report it."
            )
        if error:
            errors.append(error / float(np.abs(ours[name]).max()))
            parts.append(error / bound)
    return max(errors), max(parts)


def _results(region: Region, encoded: Sequence[Integers]) -> Arrays:
    found = ReferenceBackend().compile(region.program).clear(encoded)
    shapes = [d.shape_of(n) for n in region.program.results]
    return {
        f"result_{k}": r.reshape(shape)
        for k, (r, shape) in enumerate(zip(found, shapes, strict=True))
    }


def _example(region: Region, half: Half) -> list[Tensor]:
    """Return the call that was captured where it is known; else inputs of zeros."""
    given = region.call.tensors() if region.call is not None else []
    fits = [tuple(t.shape) for t in given] == [tuple(t.shape) for t in half.examples]
    return given if fits else list(half.examples)


def _inputs(half: Half, values: Arrays) -> list[Tensor]:
    return [torch.from_numpy(values[n]) for n in half.inputs]


def _run_half(half: Half, values: Arrays) -> Arrays:
    with torch.no_grad():
        results = half.module(*_inputs(half, values))
    return _named(half.outputs, results)


def _rounded(half: Half, values: Arrays) -> dict[str, Rounded]:
    found = rounded_results(half.module, _inputs(half, values))
    return dict(zip(half.outputs, found, strict=True))


def _named(names: Sequence[str], values: Sequence[Tensor]) -> Arrays:
    return {n: v.detach().numpy() for n, v in zip(names, values, strict=True)}


def _difference(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> float:
    """Return the largest difference; nan where one of the two is, which no bound allows."""
    if ours.dtype.kind != "f":
        return 0.0 if np.array_equal(ours, theirs) else np.inf
    differs = ours != theirs  # infinities are equal
    return float(np.abs(ours[differs].astype(np.float64) - theirs[differs]).max(initial=0.0))

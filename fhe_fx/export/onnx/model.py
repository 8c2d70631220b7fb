"""What all ONNX models here have in common: version, metadata, and that they are valid."""

from __future__ import annotations

import json
from typing import Any

import onnx
from onnx import helper
from torch import Tensor

from fhe_fx.errors import BackendError
from fhe_fx.report.machine import installed_version
from fhe_fx.runtime.codec import Codec, Port

__all__ = [
    "ENCODINGS",
    "IR_VERSION",
    "OPSET",
    "checked",
    "described",
    "encoded_name",
    "encodings",
    "finished",
    "result_name",
]

OPSET = 20
IR_VERSION = 10
"""Read by onnxruntime 1.18 and later."""
ENCODINGS = "fhe_fx.encodings"
"""Key of the metadata that hold the encodings of a circuit's inputs and results, as JSON."""
_MAX_BYTES = 2**31 - 1  # of a protobuf message


def encoded_name(number: int) -> str:
    """Return how all models call an input of the circuit."""
    return f"encoded_{number}"


def result_name(number: int) -> str:
    """Return how all models call a result of the circuit."""
    return f"result_{number}"


def finished(graph: onnx.GraphProto, name: str, codec: Codec) -> onnx.ModelProto:
    """Make a model of a graph, with the encodings of a circuit in its metadata."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    return described(model, name, codec)


def described(model: onnx.ModelProto, name: str, codec: Codec) -> onnx.ModelProto:
    """Write who made a model, of what, and with which encodings."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "fhe_fx", installed_version("fhe_fx")
    del model.metadata_props[:]
    helper.set_model_props(model, {"fhe_fx.name": name, ENCODINGS: json.dumps(encodings(codec))})
    return model


def encodings(codec: Codec) -> dict[str, list[dict[str, Any]]]:
    """Describe a codec: real = scale * integer + offset, element by element.

    Scales and offsets are nested lists that broadcast to the shape; JSON keeps every bit of a
    double.
    """
    return {
        "inputs": [_encoding(port, encoded_name(k)) for k, port in enumerate(codec.inputs)],
        "results": [_encoding(port, result_name(k)) for k, port in enumerate(codec.results)],
    }


def _encoding(port: Port, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "source": port.source,
        "shape": list(port.shape),
        "bits": port.type.bits,
        "low": port.type.low,
        "high": port.type.high,
        "scale": _compact(port.type.scale).tolist(),
        "offset": _compact(port.type.offset).tolist(),
    }


def _compact(values: Tensor) -> Tensor:
    """Keep one entry of each dimension along which values do not vary."""
    for dim in range(values.dim()):
        first = values.narrow(dim, 0, 1)
        if bool((first == values).all()):
            values = first
    return values


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with the shape of every value, after ONNX's own checks.

    Raises:
        BackendError: if it is not valid, or too large for one file.
    """
    name = next((p.value for p in model.metadata_props if p.key == "fhe_fx.name"), "model")
    if (size := model.ByteSize()) > _MAX_BYTES:
        raise BackendError(
            f"{name}: an ONNX file holds at most {_MAX_BYTES:,} bytes, and this part of the model "
            f"has {size:,}. Encrypt a part of a smaller model."
        )
    try:
        inferred = onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
        onnx.checker.check_model(inferred, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"{name}: the ONNX model is not valid: {error}") from error
    return inferred

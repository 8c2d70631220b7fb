"""The client's float halves as ONNX models, by PyTorch's exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import fx

from fhe_fx.errors import BackendError
from fhe_fx.export.onnx.model import OPSET, checked, described
from fhe_fx.export.onnx.remainder import Half
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.region import Region

__all__ = ["float_models"]


def float_models(
    halves: tuple[Half, Half], region: Region
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return what a client runs before the circuit, and after it.

    The first takes the model's inputs and gives the integers to encrypt (`encoded_0`, ...); the
    second takes the decrypted integers (`result_0`, ...) and gives the model's results
    (`output_0`, ...). What the second needs besides has one name in both: `carried_0`, ..., or the
    name of an input of the model. Shapes are those of the captured example.

    Args:
        halves: what `remainder` returned.
        region: what it was given.

    Raises:
        BackendError: if a part of the rest of the model has no ONNX counterpart.
    """
    codec = Codec.of(region.program)
    name = region.program.name
    before, after = halves
    return (
        checked(described(_converted(before, f"before {name}"), f"before {name}", codec)),
        checked(described(_converted(after, f"after {name}"), f"after {name}", codec)),
    )


def _converted(half: Half, name: str) -> onnx.ModelProto:
    try:
        with _quietly():
            program = torch.onnx.export(
                half.module,
                half.examples,
                input_names=list(half.inputs),
                output_names=list(half.outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise BackendError(
            f"{name}: PyTorch's ONNX exporter refuses it: {reason} It has the operators "
            f"{', '.join(_operators(half.module))}."
        ) from error
    assert program is not None
    return program.model_proto


def _operators(module: fx.GraphModule) -> list[str]:
    called = {n.target for n in module.graph.nodes if n.op == "call_function"}
    return sorted(str(getattr(t, "__name__", t)) for t in called)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep to itself what the exporter says about itself."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

"""Models out of files that hold a graph: exported programs and ONNX."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from fhe_fx.capture import graph_of_exported
from fhe_fx.export.models import ModelError, load_exported

__all__ = ["graph_of_file"]


def graph_of_file(path: Path) -> fx.GraphModule:
    """Read a `.pt2` or `.onnx` file as a graph.

    Raises:
        ModelError: if there is no such file, or it holds no graph.
        CaptureError: if its shapes are dynamic.
        UnsupportedOpError: lists all operators of an ONNX file that have no translation.
    """
    if path.suffix == ".pt2":
        return graph_of_exported(load_exported(path))
    if path.suffix == ".onnx":
        from fhe_fx.export.onnx.read import read_onnx

        return read_onnx(path)
    raise ModelError(f"{path} is neither a .pt2 file of torch.export.save nor an .onnx file.")

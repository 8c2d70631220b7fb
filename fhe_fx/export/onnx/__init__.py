"""ONNX: the client's float remainder of a model, and the integer program of its encrypted part.

Needs the extra: `pip install 'fhe_fx[onnx]'`.
"""

try:
    from fhe_fx.export.onnx.floats import float_models
    from fhe_fx.export.onnx.integers import integer_model
    from fhe_fx.export.onnx.model import ENCODINGS
    from fhe_fx.export.onnx.remainder import Half, remainder
    from fhe_fx.export.onnx.write import (
        AFTER,
        BEFORE,
        INTEGERS,
        ONNX_FILES,
        export_onnx,
        write_onnx,
    )
except ModuleNotFoundError as error:
    if error.name not in {"onnx", "onnxruntime", "onnxscript"}:
        raise
    raise ModuleNotFoundError(
        f"fhe_fx.export.onnx needs {error.name}: pip install 'fhe_fx[onnx]'", name=error.name
    ) from error

__all__ = [
    "AFTER",
    "BEFORE",
    "ENCODINGS",
    "INTEGERS",
    "ONNX_FILES",
    "Half",
    "export_onnx",
    "float_models",
    "integer_model",
    "remainder",
    "write_onnx",
]

"""Files of numbers: one array, or an array for each name."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fhe_fx.errors import CalibrationError

__all__ = ["load_array", "load_arrays"]


def load_array(path: Path) -> Any:
    """Read a `.npy` file of numbers.

    Raises:
        CalibrationError: if it is not one.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CalibrationError(f"{path} cannot be read as a .npy array: {error}.") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise CalibrationError(f"{path} does not hold one array of numbers.")
    return _plain(array)


def load_arrays(path: Path) -> dict[str, Any]:
    """Read a `.npz` file of arrays with as many rows each.

    Raises:
        CalibrationError: if it is not one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile) as error:
        raise CalibrationError(f"{path} cannot be read as a .npz of arrays: {error}.") from error
    odd = [name for name, array in arrays.items() if array.dtype.kind not in "fiub"]
    if not arrays or odd:
        what = f"{odd[0]} is no array of numbers" if odd else "it holds no array"
        raise CalibrationError(f"{path}: {what}. Give one, [n, ...], for each argument.")
    counts = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        listed = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise CalibrationError(f"{path} holds unequal numbers of rows, or none: {listed}.")
    return {name: _plain(array) for name, array in arrays.items()}


def _plain(array: Any) -> Any:
    if array.dtype.kind == "b":
        return array
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)

"""Constants of a circuit go to MLIR as bytes: Concrete prints each as text and lets MLIR read it.

The attribute is the same either way, and MLIR keeps equal ones once. For the tables and weights of
a layer of a language model the text is tens of megabytes, and reading it takes as long as all that
the compiler does before it generates machine code.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from concrete.fhe.mlir import context as concrete_context

__all__ = ["constants_as_bytes"]

_LOCK = threading.Lock()


@contextlib.contextmanager
def constants_as_bytes() -> Iterator[None]:
    """Let Concrete's converter make tensors of constants from bytes; scalars stay as they are."""
    context: Any = concrete_context.Context
    from_text = context.attribute

    def attribute(self: Any, resulting_type: Any, value: Any) -> Any:
        known = _dense(resulting_type, value)
        return from_text(self, resulting_type, value) if known is None else known

    with _LOCK:
        context.attribute = attribute
        try:
            yield
        finally:
            context.attribute = from_text


def _dense(resulting_type: Any, value: Any) -> Any:
    """Return a tensor of integers as an attribute; None for what is none, or would be refused.

    MLIR's layout: row by row, each integer in the fewest bytes that hold its width, low byte first,
    and the bits above the width zero. One-bit integers are packed, so they are left to the text.
    """
    if not isinstance(value, (list, np.ndarray)) or not resulting_type.shape:
        return None
    array, width = _integers(value), resulting_type.bit_width
    if array is None or array.shape != tuple(resulting_type.shape):
        return None
    if not array.size or width < 2 or width > 64:
        return None
    # A type without a sign takes what is in range with one, or without.
    if int(array.min()) < -(1 << (width - 1)) or int(array.max()) >= 1 << width:
        return None
    words = array.astype(np.uint64) & np.uint64((1 << width) - 1)
    n_bytes = -(-width // 8)
    raw = np.ascontiguousarray(words.astype("<u8").reshape(-1, 1).view(np.uint8)[:, :n_bytes])
    is_index = resulting_type.is_index
    element: Any = (
        concrete_context.IndexType.get()
        if is_index
        else concrete_context.IntegerType.get_signless(width)
    )
    return concrete_context.MlirDenseElementsAttr.get(raw, type=element, shape=list(array.shape))


def _integers(value: Any) -> np.ndarray[Any, Any] | None:
    """Return an array of integers, or lists of what one held, as they are; None for others."""
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "iu" else None
    leaf = value
    while isinstance(leaf, list) and leaf:
        leaf = leaf[0]
    if not isinstance(leaf, int):
        return None
    for dtype in (np.int64, np.uint64):  # without one numpy makes floats of what needs 64 bits
        with contextlib.suppress(OverflowError, DeprecationWarning), warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            return np.array(value, dtype=dtype)
    return None

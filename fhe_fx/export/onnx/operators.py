"""What each ONNX operator of a float transformer or convolution network is in torch.

A rule takes the operator's inputs and its attributes. Inputs that say a shape, an axis or a count
are constants in such models; `ints` reads them. Semantics: https://onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["DTYPES", "NUMBERED", "OPERATORS", "ints"]

DTYPES = {
    1: torch.float32,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float32,  # half precision is computed in single
    11: torch.float64,
}


NUMBERED = frozenset(
    {
        "Clip",
        "CumSum",
        "Expand",
        "ReduceMean",
        "ReduceSum",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Trilu",
        "Unsqueeze",
    }
)
"""Operators of one tensor; their other inputs say how, and are constants in models we read."""


def ints(x: Any) -> list[int]:
    """Read a constant tensor of numbers."""
    return [int(n) for n in x.reshape(-1).tolist()]


def _axes(given: Tensor | None, attribute: Any) -> list[int] | None:
    if given is not None:
        return ints(given)
    return None if attribute is None else list(attribute)


def _reshape(x: Tensor, shape: Tensor, allowzero: int = 0) -> Tensor:
    sizes = ints(shape)
    kept = [x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(sizes)]
    return x.reshape(kept)


def _unsqueeze(x: Tensor, given: Tensor | None = None, axes: Any = None) -> Tensor:
    wanted = _axes(given, axes) or []
    rank = x.dim() + len(wanted)
    for axis in sorted(a % rank for a in wanted):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, given: Tensor | None = None, axes: Any = None) -> Tensor:
    wanted = _axes(given, axes)
    return x.squeeze() if wanted is None else x.squeeze([a % x.dim() for a in wanted])


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(
        x: Tensor,
        given: Tensor | None = None,
        axes: Any = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        wanted = _axes(given, axes)
        if not wanted and noop_with_empty_axes:
            return x
        return function(x, wanted or list(range(x.dim())), bool(keepdims))

    return rule


def _slice(x: Tensor, starts: Tensor, ends: Tensor, *others: Tensor | None) -> Tensor:
    first, last = ints(starts), ints(ends)
    axes = ints(others[0]) if others and others[0] is not None else list(range(len(first)))
    steps = ints(others[1]) if len(others) > 1 and others[1] is not None else [1] * len(first)
    for start, end, axis, step in zip(first, last, axes, steps, strict=True):
        size = x.shape[axis]
        chosen = (
            list(range(size))[start:end:step] if step > 0 else _backwards(size, start, end, step)
        )
        if step == 1:
            x = x.narrow(axis, chosen[0] if chosen else 0, len(chosen))
        else:
            x = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64))
    return x


def _backwards(size: int, start: int, end: int, step: int) -> list[int]:
    begin = min(start + size if start < 0 else start, size - 1)
    stop = -1 if end < -size else (end + size if end < 0 else end)
    return list(range(begin, stop, step))


def _split(
    x: Tensor, given: Tensor | None = None, axis: int = 0, **others: Any
) -> tuple[Tensor, ...]:
    sizes = _axes(given, others.get("split"))
    if sizes is None:
        parts: int = others.get("num_outputs") or others["outputs"]
        sizes = [len(c) for c in torch.arange(x.shape[axis]).chunk(parts)]
    return torch.split(x, sizes, axis)


def _gather(x: Tensor, index: Tensor, axis: int = 0) -> Tensor:
    axis %= x.dim()
    if axis == 0 and index.dim() and x.dim() == 2:
        return functional.embedding(index, x)  # a table of words
    flat = x.index_select(axis, index.reshape(-1).long() % x.shape[axis])
    return flat.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _gemm(a: Tensor, b: Tensor, c: Tensor | None = None, **given: Any) -> Tensor:
    a = a.t() if given.get("transA") else a
    b = b.t() if given.get("transB") else b
    product = given.get("alpha", 1.0) * (a @ b) if given.get("alpha", 1.0) != 1 else a @ b
    if c is None:
        return product
    return product + (c if given.get("beta", 1.0) == 1 else given["beta"] * c)


def _layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    axis: int = -1,
    epsilon: float = 1e-5,
    **_: Any,
) -> Tensor:
    return functional.layer_norm(x, list(x.shape[axis % x.dim() :]), scale, bias, epsilon)


def _softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def _concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


def _symmetric(pads: Any, spatial: int) -> list[int] | None:
    """Return one padding an axis, or None if its two ends differ."""
    pads = list(pads or [0] * (2 * spatial))
    return pads[:spatial] if pads[:spatial] == pads[spatial:] else None


def _padded(x: Tensor, given: dict[str, Any], spatial: int, value: float) -> tuple[Tensor, Any]:
    if given.get("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}:
        raise NotImplementedError(f"auto_pad={given['auto_pad']}")
    pads: Any = given.get("pads")
    both = _symmetric(pads, spatial)
    if both is not None:
        return x, both
    ends = [n for axis in reversed(range(spatial)) for n in (pads[axis], pads[axis + spatial])]
    return functional.pad(x, ends, value=value), [0] * spatial


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **given: Any) -> Tensor:
    spatial = weight.dim() - 2
    x, padding = _padded(x, given, spatial, 0.0)
    run = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
    ones = [1] * spatial
    made: Tensor = run(
        x,
        weight,
        bias,
        given.get("strides", ones),
        padding,
        given.get("dilations", ones),
        given.get("group", 1),
    )
    return made


def _max_pool(x: Tensor, **given: Any) -> Tensor:
    kernel = given["kernel_shape"]
    x, padding = _padded(x, given, len(kernel), -torch.inf)
    run = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    ones = [1] * len(kernel)
    made: Tensor = run(
        x,
        kernel,
        given.get("strides", ones),
        padding,
        given.get("dilations", ones),
        bool(given.get("ceil_mode", 0)),
    )
    return made


def _average_pool(x: Tensor, **given: Any) -> Tensor:
    kernel = given["kernel_shape"]
    padding = _symmetric(given.get("pads"), len(kernel))
    if padding is None or given.get("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}:
        raise NotImplementedError("padding that differs between the ends")
    run = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    made: Tensor = run(
        x,
        kernel,
        given.get("strides", [1] * len(kernel)),
        padding,
        bool(given.get("ceil_mode", 0)),
        bool(given.get("count_include_pad", 0)),
    )
    return made


def _batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: float = 1e-5,
    **_: Any,
) -> Tensor:
    return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None, **given: Any) -> Tensor:
    ends = [
        given.get(name) if end is None else float(end)
        for name, end in (("min", low), ("max", high))
    ]
    return torch.clamp(x, *ends)


def _trilu(x: Tensor, k: Tensor | None = None, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(ints(shape))))


def _constant_of_shape(shape: Tensor, value: Tensor | None = None) -> Tensor:
    filling = torch.zeros(1) if value is None else value
    return filling.reshape(-1)[0].expand(ints(shape)).clone()


def _div(a: Tensor, b: Tensor) -> Tensor:
    is_float = a.is_floating_point()
    return a / b if is_float else torch.div(a, b, rounding_mode="trunc")


OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda x, to, **_: x.to(DTYPES[to]),
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Cos": torch.cos,
    "CumSum": lambda x, axis: torch.cumsum(x, int(axis)),
    "Div": _div,
    "Dropout": lambda x, *_, **__: x,
    "Elu": lambda x, alpha=1.0: functional.elu(x, alpha),
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": _expand,
    "Flatten": lambda x, axis=1: x.reshape(-1, int(torch.tensor(x.shape[axis:]).prod())),
    "Gather": _gather,
    "Gelu": lambda x, approximate="none": functional.gelu(x, approximate=approximate),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean(list(range(2, x.dim())), True),
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, alpha=0.01: functional.leaky_relu(x, alpha),
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Max": lambda a, b: torch.maximum(a, b),
    "MaxPool": _max_pool,
    "Min": lambda a, b: torch.minimum(a, b),
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Range": lambda a, b, step: torch.arange(a.item(), b.item(), step.item()).to(a.dtype),
    "Reciprocal": torch.reciprocal,
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": functional.softplus,
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Tile": lambda x, repeats: x.repeat(ints(repeats)),
    "Transpose": lambda x, perm=None: x.permute(perm or list(reversed(range(x.dim())))),
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
}
"""By the name of the operator in the default domain. `Constant` and `Shape` are known on import."""

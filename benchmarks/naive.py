"""Attention as one would write it in Concrete by hand, beside which ours stands.

Quantized per tensor, as Concrete's documentation shows operations on encrypted data: products of
two encrypted matrices (`q @ k.T`), a softmax that subtracts the greatest score (`np.max`) and goes
through tables for the exponential and the division, `fhe.round_bit_pattern` before each table.
Masked pairs are computed, kept out of the greatest score, and multiplied by zero. The results of
all heads are brought to one scale by a table each before the output projection. Nothing in it is
fhe_fx's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from concrete import fhe  # noqa: TID251 -- the circuit that is compared with is Concrete's own

from fhe_fx.backends.concrete.folders import owned_folders

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Head:
    """Weights `[channels, 64]` and biases `[64]` of one head, in float."""

    query: tuple[Array, Array]
    key: tuple[Array, Array]
    value: tuple[Array, Array]

    @staticmethod
    def of_gpt2(attention: Any, head: int) -> Head:
        """Cut a head out of GPT-2's attention, before its output projection."""
        weight = attention.c_attn.weight.detach().numpy()
        bias = attention.c_attn.bias.detach().numpy()
        width, dim = attention.split_size, attention.head_dim
        cuts = [slice(i * width + head * dim, i * width + (head + 1) * dim) for i in range(3)]
        return Head(*[(weight[:, cut], bias[cut]) for cut in cuts])

    def __call__(self, x: Array) -> Array:
        """Return the head's result in float, `[tokens, 64]`, of `x`, `[tokens, channels]`."""
        q, k, v = (x @ w + b for w, b in (self.query, self.key, self.value))
        scores = np.where(causal(len(x)) > 0, q @ k.T / q.shape[-1] ** 0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result: Array = weights / weights.sum(-1, keepdims=True) @ v
        return result


@dataclass(frozen=True)
class Attention:
    """All heads and the output projection, `[channels, channels]` and `[channels]`, in float."""

    heads: tuple[Head, ...]
    projection: tuple[Array, Array]

    @staticmethod
    def of_gpt2(attention: Any) -> Attention:
        """Take GPT-2's attention."""
        projection = [p.detach().numpy() for p in attention.c_proj.parameters()]
        heads = tuple(Head.of_gpt2(attention, i) for i in range(attention.num_heads))
        return Attention(heads, (projection[0], projection[1]))

    def __call__(self, x: Array) -> Array:
        """Return the result in float, `[tokens, channels]`, of `x` of the same shape."""
        result: Array = self.joined(x) @ self.projection[0] + self.projection[1]
        return result

    def joined(self, x: Array) -> Array:
        """Return the results of the heads side by side."""
        return np.concatenate([head(x) for head in self.heads], axis=-1)


def causal(tokens: int) -> Array:
    """Return 1 where a row sees a column."""
    return np.tril(np.ones((tokens, tokens), np.int64))


class NaiveHead:
    """The integer head, quantized on samples."""

    def __init__(self, head: Head, samples: Sequence[Array], n_bits: int, msbs: int = 6) -> None:
        """Choose scales.

        Args:
            head: in float.
            samples: inputs, `[tokens, channels]` each.
            n_bits: of weights and activations.
            msbs: bits that are left before each table.
        """
        self.n_bits, self.tokens = n_bits, len(samples[0])
        self.levels, self.msbs = 2 ** (n_bits - 1) - 1, msbs
        x = np.stack(samples)
        self.x_scale = np.abs(x).max() / self.levels
        self.weights, self.tables = [], []
        for w, b in (head.query, head.key, head.value):
            linear, scale = _whole(w, b, self.x_scale, self.levels)
            out_scale = np.abs(x @ w + b).max() / self.levels
            self.weights.append(linear)
            self.tables.append((scale / out_scale, out_scale))
        self.root = head.query[0].shape[1] ** -0.5
        scores = np.abs([self._scores(s, head) for s in samples]).max()
        self.score_scale = scores / self.levels
        self.rounders = {
            name: fhe.AutoRounder(target_msbs=msbs)
            for name in ("query", "key", "value", "scores", "exp", "sum", "weight")
        }

    def _scores(self, x: Array, head: Head) -> Array:
        q, k = (x @ w + b for w, b in (head.query, head.key))
        result: Array = q @ k.T * self.root
        return result

    def _read(self, name: str, x: Any, table: Callable[[Any], Any], most: int) -> Any:
        return _read(self.rounders[name], x, table, most)

    def __call__(self, x: Any) -> Any:
        """Compute on integers `[tokens, channels]`; the result times `result_scale` is real."""
        projected = []
        for name, (w, b), (factor, _) in zip(
            ("query", "key", "value"), self.weights, self.tables, strict=True
        ):
            read = self._read(name, x @ w + b, _times(factor), self.levels)
            projected.append(read)
        q, k, v = projected
        factor = self.tables[0][1] * self.tables[1][1] * self.root / self.score_scale
        scores = self._read("scores", q @ k.T, _times(factor), self.levels)
        seen = causal(self.tokens)
        scores = scores * seen - self.levels * (1 - seen)  # the greatest is of what a row sees
        below = scores - np.max(scores, axis=1, keepdims=True)
        most = 2**self.n_bits - 1
        scale = self.score_scale
        exps = self._read("exp", below, lambda d: most * np.exp(np.minimum(d, 0) * scale), most)
        exps = exps * seen
        total = np.sum(exps, axis=1, keepdims=True)
        inverse = self._read("sum", total, lambda t: most * most / np.maximum(t, most), most)
        # In 0 to `levels`, as wide as signed values: Concrete's product of two encrypted matrices
        # overflows where one of them is signed and the other is unsigned and has a bit more.
        factor = self.levels / most**2
        weights = self._read("weight", exps * inverse, _times(factor), self.levels)
        return weights @ v

    def adjust(self, inputs: Sequence[Array]) -> None:
        """Find how many bits each rounding drops."""
        fhe.AutoRounder.adjust(self, inputs)

    @property
    def result_scale(self) -> float:
        """What one unit of the result is."""
        return float(self.tables[2][1] / self.levels)

    def quantize(self, x: Array) -> Array:
        """Return the integers of an input."""
        whole: Array = np.clip(np.rint(x / self.x_scale), -self.levels, self.levels)
        return whole.astype(np.int64)


class NaiveAttention:
    """The integer heads, brought to one scale and multiplied by the output projection."""

    def __init__(
        self, attention: Attention, samples: Sequence[Array], n_bits: int, msbs: int = 6
    ) -> None:
        """Choose scales; the arguments are those of a head."""
        self.heads = [NaiveHead(head, samples, n_bits, msbs) for head in attention.heads]
        self.n_bits, self.tokens = n_bits, len(samples[0])
        self.levels = self.heads[0].levels
        self.scale = np.abs([attention.joined(x) for x in samples]).max() / self.levels
        linear = _whole(*attention.projection, self.scale, self.levels)
        (self.weight, self.bias), self.result_scale = linear
        self.rounders = [fhe.AutoRounder(target_msbs=msbs) for _ in self.heads]
        self.quantize = self.heads[0].quantize

    def adjust(self, inputs: Sequence[Array]) -> None:
        """Find how many bits each rounding drops, head by head, which do not read each other."""
        for number in range(len(self.heads)):
            fhe.AutoRounder.adjust(lambda x, i=number: self._read_head(i, x), inputs)

    def _read_head(self, number: int, x: Any) -> Any:
        head = self.heads[number]
        table = _times(head.result_scale / self.scale)
        return _read(self.rounders[number], head(x), table, self.levels)

    def __call__(self, x: Any) -> Any:
        """Compute on integers `[tokens, channels]`; the result times `result_scale` is real."""
        read = tuple(self._read_head(i, x) for i in range(len(self.heads)))
        return np.concatenate(read, axis=1) @ self.weight + self.bias


def _whole(
    weight: Array, bias: Array, scale: float, levels: int
) -> tuple[tuple[Array, Array], float]:
    """Return a linear layer on integers of a scale, and the scale of its results."""
    w_scale = np.abs(weight).max() / levels
    whole = np.rint(weight / w_scale).astype(np.int64)
    shift = np.rint(bias / (w_scale * scale)).astype(np.int64)
    return (whole, shift), float(w_scale * scale)


def _read(rounder: fhe.AutoRounder, x: Any, table: Callable[[Any], Any], most: int) -> Any:
    """Round, then look up: `table` in float, clipped to a whole number from -most to most."""
    rounded = fhe.round_bit_pattern(x, lsbs_to_remove=rounder)

    def whole(v: Any) -> Any:
        return np.clip(np.rint(table(v)), -most, most).astype(np.int64)

    return fhe.univariate(whole)(rounded)


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda v: v * factor


def measured(
    part: str, layer: Head | Attention, samples: Sequence[Array], heldout: Sequence[Array],
    n_bits: int, *, p_error: float | None, is_executed: bool, simulated: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Compile the naive circuit of a layer and compare it with the float one.

    Args:
        part: what the layer is called.
        layer: the same weights as ours.
        samples: to choose scales, `[tokens, channels]` each.
        heldout: to compare on.
        n_bits: of weights and activations.
        p_error: of each look-up; None for Concrete's default.
        is_executed: whether to run it once with keys.
        simulated: on how many of `heldout` noise is simulated.
    """
    naive: NaiveHead | NaiveAttention = (
        NaiveHead(layer, samples, n_bits)
        if isinstance(layer, Head)
        else NaiveAttention(layer, samples, n_bits)
    )
    inputs = [naive.quantize(x) for x in samples]
    naive.adjust(inputs)
    chosen = {} if p_error is None else {"p_error": p_error}
    start = time.perf_counter()
    with owned_folders() as keep:
        circuit = fhe.Compiler(lambda x: naive(x), {"x": "encrypted"}).compile(
            inputs, fhe_simulation=True, **chosen
        )
        keep(circuit.server)
        keep(circuit.simulator)
    seconds = time.perf_counter() - start

    def error(run: Callable[[Array], Array], these: Sequence[Array]) -> float:
        off = size = 0.0
        for x in these:
            expected = layer(x)
            off += np.square(run(naive.quantize(x)) * naive.result_scale - expected).sum()
            size += np.square(expected).sum()
        return float(f"{(off / size) ** 0.5:.3g}")

    row = {
        "part": f"{part}, by hand", "tokens": naive.tokens, "n_bits": n_bits,
        "look_ups": circuit.programmable_bootstrap_count, "complexity": circuit.complexity,
        "p_error": circuit.p_error, "compile_seconds": round(seconds, 1),
        "key_bytes": circuit.size_of_bootstrap_keys + circuit.size_of_keyswitch_keys,
        "clear_error": error(lambda x: circuit.graph(x), heldout),
        "simulate_error": error(circuit.simulate, heldout[:simulated]),
    }  # fmt: skip
    if is_executed:
        circuit.keygen()
        start = time.perf_counter()
        row["execute_error"] = error(circuit.encrypt_run_decrypt, heldout[:1])
        row["execute_seconds"] = round(time.perf_counter() - start, 1)
    return row

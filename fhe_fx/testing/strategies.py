"""Random small programs, for Hypothesis: linear maps, functions, moves, reductions, products.

@given(recipes())
def test_my_pass_keeps_the_meaning(recipe):
    program = program_from(recipe, recipe.samples())
    ...
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own habit
from hypothesis import strategies as st
from torch import Tensor

from fhe_fx.testing.programs import seeded

__all__ = ["Recipe", "recipes"]

Step = Callable[..., Tensor]
"""One operation on earlier values."""


def _weight(rng: random.Random, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 20))
    return torch.randn(shape, generator=generator) / float(shape[0] ** 0.5)


def _clear(rng: random.Random, x: Tensor) -> Step:
    w, v = _weight(rng, x.shape[-1], rng.choice((2, 3, 5))), _weight(rng, x.shape[-1])
    left = _weight(rng, x.shape[-2], x.shape[-2])
    number = rng.choice((-2.0, 0.5, 3.0))
    return rng.choice((
        lambda x: x @ w,
        lambda x: F.linear(x, w.T, w[0]),
        lambda x: torch.addmm(w[0], x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], -1),
        lambda x: left @ x,
        lambda x: x + v,
        lambda x: v - x,
        lambda x: x * v,
        lambda x: x / (v.abs() + 0.5),
        lambda x: x * number + 0.3,
        lambda x: F.layer_norm(x + v, v.shape, v + 1, v),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1) * v,
    ))  # fmt: skip


def _function(rng: random.Random, x: Tensor) -> Step:
    return rng.choice((
        torch.tanh, torch.sigmoid, torch.erf, F.gelu, F.silu, F.relu,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x * 0.5 * (1 + torch.erf(x * 0.7071)),
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.tanh(x) ** 2,
        lambda x: torch.exp(torch.tanh(x)),
        lambda x: torch.log(torch.sigmoid(x) + 0.2),
        lambda x: torch.sqrt(F.relu(x) + 0.3),
        lambda x: torch.rsqrt(x * x + 0.5),
        lambda x: torch.reciprocal(x.abs() + 0.7),
    ))  # fmt: skip


def _structure(rng: random.Random, x: Tensor) -> Step:
    dim = rng.randrange(1, x.dim())
    n = x.shape[dim]
    index = torch.tensor([rng.randrange(n) for _ in range(rng.choice((n, n - 1, n + 1)) or 1)])
    mask = _weight(rng, *x.shape[1:]) > 0
    return rng.choice((
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(0, 2, 1).reshape(x.shape),
        lambda x: x.index_select(dim, index),
        lambda x: x.narrow(dim, 0, max(1, n - 1)),
        lambda x: torch.cat(x.split(max(1, n // 2), dim)[::-1], dim),
        lambda x: torch.cat([x, x.flip(1)], 2),
        lambda x: x.unsqueeze(1).expand(1, 2, *x.shape[1:]).reshape(1, -1, x.shape[-1]),
        lambda x: torch.where(mask, x, 0.5),
        lambda x: x.masked_fill(mask, 0.0),
    ))  # fmt: skip


def _reduction(rng: random.Random, x: Tensor) -> Step:
    return rng.choice((
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x.sum(1, keepdim=True) / 2,
        lambda x: x + x.var(-1, unbiased=False, keepdim=True),
        lambda x: x.softmax(-1),
        lambda x: x.log_softmax(-1),
        lambda x: x.softmax(1),
    ))  # fmt: skip


def _product(rng: random.Random, x: Tensor, y: Tensor) -> Step:
    if x.shape != y.shape:
        return lambda x, y: x * y.mean((1, 2), keepdim=True)
    return rng.choice((
        lambda x, y: x + y,
        lambda x, y: x - y,
        lambda x, y: x * y,
        lambda x, y: x / (1 + y.abs()),
        lambda x, y: (x @ y.mT) / 2,
        lambda x, y: torch.bmm(x, y.mT),
        lambda x, y: F.scaled_dot_product_attention(x, y, x),
        lambda x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True),
    ))  # fmt: skip


_MAKERS: dict[str, Callable[..., Step]] = {
    "c": _clear,
    "f": _function,
    "s": _structure,
    "r": _reduction,
    "p": _product,
}


@dataclass(frozen=True)
class Recipe:
    """A random program: steps that read earlier values; the last value is the result."""

    steps: tuple[tuple[Step, tuple[int, ...]], ...]
    """Each operation, with the numbers of the values that it reads; inputs come first."""
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each input."""
    seed: int
    """Of the samples."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it in PyTorch."""
        values = list(inputs)
        for step, arguments in self.steps:
            values.append(step(*[values[i] for i in arguments]))
        return values[-1]

    def samples(self) -> list[tuple[Tensor, ...]]:
        """Return sixteen values of the inputs, always the same."""
        inputs = [seeded(s, seed=self.seed + i) for i, s in enumerate(self.shapes)]
        return list(zip(*inputs, strict=True))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Draw a program whose values stay moderate and vary on its samples.

    It has one or two inputs `[1, n, d]` of at most 24 numbers, and up to five steps.
    """
    seed = draw(st.integers(0, 10_000))
    rng = random.Random(seed)
    shape = (1, draw(st.integers(2, 4)), draw(st.integers(2, 6)))
    shapes = (shape,) * draw(st.integers(1, 2))
    recipe = Recipe((), shapes, seed)
    values = [torch.stack(v) for v in zip(*recipe.samples(), strict=True)]
    steps: list[tuple[Step, tuple[int, ...]]] = []
    makers = draw(st.lists(st.sampled_from("cfsrp"), min_size=1, max_size=5))
    for kind in makers:
        last = len(values) - 1
        other = rng.randrange(len(values))
        arguments = (last, other) if kind == "p" else (last,)
        step = _MAKERS[kind](rng, *[values[i][0] for i in arguments])
        new = torch.stack([step(*row) for row in zip(*[values[i] for i in arguments], strict=True)])
        if new.abs().max() > 30 or new.std() < 0.05 or new[0].numel() > 40:
            continue
        steps.append((step, arguments))
        values.append(new)
    if not steps:
        steps.append((torch.tanh, (0,)))
    return Recipe(tuple(steps), shapes, seed)

"""Every operator that has a lowering, through the whole pipeline to integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own habit
from torch import Tensor, nn

from fhe_fx.errors import UnsupportedOpError
from fhe_fx.passes.base import Pipeline
from fhe_fx.passes.fuse_maps import FuseMaps
from fhe_fx.passes.normalize import Normalize
from tests.programs import (
    lower_with_prediction,
    program_from,
    relative_error,
    run_integers,
    seeded,
)

W = torch.randn((6, 5), generator=torch.Generator().manual_seed(3)) / 2
B = torch.randn((5,), generator=torch.Generator().manual_seed(4))
V = torch.randn((6,), generator=torch.Generator().manual_seed(5)) + 2
SQUARE = torch.randn((4, 4), generator=torch.Generator().manual_seed(6)) / 2
BATCH = torch.randn((2, 3, 3), generator=torch.Generator().manual_seed(7))
MASK = torch.tensor([[True, False, True, True, False, True]] * 4) ^ (torch.arange(4) == 2)[:, None]
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()


def _seeded(kind: Callable[..., nn.Module], *sizes: int) -> nn.Module:
    """Build a module whose weights do not depend on who ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*sizes)


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    name: str
    function: Callable[..., object] | nn.Module
    shapes: tuple[tuple[int, ...], ...] = ((1, 4, 6),)
    positive: tuple[int, ...] = ()


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * V


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


TWO = ((1, 4, 6), (1, 4, 6))
HEADS = ((1, 2, 4, 3),) * 3
IMAGE = ((1, 2, 4, 4),)
CASES = [
    Case("linear", _seeded(nn.Linear, 6, 5)),
    Case("addmm", lambda x: torch.addmm(B, x.view(-1, 6), W)),
    Case("addmm_alpha", lambda x: torch.addmm(B, x.view(-1, 6), W, alpha=0.5, beta=2)),
    Case("addmm_encrypted_bias", lambda x, y: torch.addmm(x, y, W), ((4, 5), (4, 6))),
    Case("matmul_clear_right", lambda x: x @ W),
    Case("matmul_clear_left", lambda x: SQUARE @ x),
    Case("matmul_vector", lambda x: x @ V),
    Case("matmul_vector_left", lambda x: torch.arange(4.0) @ x),
    Case("matmul_encrypted", lambda x, y: x @ y.transpose(-1, -2), TWO),
    Case("matmul_encrypted_vectors", lambda x, y: x @ y, ((6,), (6,))),
    Case("matmul_broadcast", lambda x, y: x @ y, ((2, 3, 4), (4, 2))),
    Case("matmul_itself", lambda x: x @ x.transpose(-1, -2)),
    Case("linear_encrypted_weight", lambda x, w: F.linear(x, w), ((3, 4), (2, 4))),
    Case("bmm", torch.bmm, ((2, 3, 4), (2, 4, 2))),
    Case("bmm_clear", lambda x: torch.bmm(x, BATCH), ((2, 4, 3),)),
    Case("baddbmm", lambda x, y: torch.baddbmm(x, y, BATCH), ((2, 4, 3), (2, 4, 3))),
    Case("add", lambda x, y: x + y, TWO),
    Case("add_alpha", lambda x, y: torch.add(x, y, alpha=3), TWO),
    Case("add_broadcast", lambda x, y: x + y, ((1, 4, 6), (6,))),
    Case("add_itself", lambda x: x + x),
    Case("add_clear", lambda x: x + V),
    Case("add_grows", lambda x: x + SQUARE[:, :1].view(4, 1, 1), ((1, 6),)),
    Case("sub", lambda x, y: x - y, TWO),
    Case("sub_alpha", lambda x, y: torch.sub(x, y, alpha=0.5), TWO),
    Case("sub_clear", lambda x: x - V),
    Case("sub_from_clear", lambda x: V - x),
    Case("rsub", lambda x: torch.rsub(x, 2.0, alpha=3)),
    Case("neg", lambda x: -x),
    Case("mul", lambda x, y: x * y, TWO),
    Case("mul_broadcast", lambda x, y: x * y, ((1, 4, 6), (4, 1))),
    Case("mul_itself", lambda x: x * x),
    Case("mul_clear", lambda x: x * V),
    Case("mul_zero_channel", lambda x: x * torch.tensor([0.0, 1, 2, 0, -1, 3])),
    Case("scalars", lambda x: (x * 3 + 1) / 7 - 0.5),
    Case("div_clear", lambda x: x / V),
    Case("div_encrypted", lambda x, y: x / y, TWO, (1,)),
    Case("div_clear_by_encrypted", lambda x: V / x, positive=(0,)),
    Case("pow_2", lambda x: x**2),
    Case("pow_3", lambda x: x**3),
    Case("pow_half", lambda x: x**0.5, positive=(0,)),
    Case("pow_negative", lambda x: x**-1.5, positive=(0,)),
    Case("pow_of_number", lambda x: 2.0**x),
    Case("pow_by_tensor", lambda x: x ** torch.tensor([1.0, 2, 3, 0, 2, 1])),
    Case("sum_last", lambda x: x.sum(-1)),
    Case("sum_all", lambda x: x.sum().view(1)),
    Case("sum_two", lambda x: x.sum((0, 2), keepdim=True)),
    Case("mean_last", lambda x: x.mean(-1, keepdim=True)),
    Case("mean_all", lambda x: x.mean().view(1)),
    Case("mean_middle", lambda x: x.mean(1)),
    Case("var", lambda x: x.var(-1)),
    Case("var_biased", lambda x: x.var(-1, unbiased=False, keepdim=True)),
    Case("var_all", lambda x: x.var().view(1)),
    Case("std", lambda x: x.std(-1)),
    Case("exp", torch.exp),
    Case("log", torch.log, positive=(0,)),
    Case("sqrt", torch.sqrt, positive=(0,)),
    Case("rsqrt", torch.rsqrt, positive=(0,)),
    Case("reciprocal", torch.reciprocal, positive=(0,)),
    Case("tanh", torch.tanh),
    Case("sigmoid", torch.sigmoid),
    Case("erf", torch.erf),
    Case("gelu", F.gelu),
    Case("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    Case("gelu_written_out", new_gelu),
    Case("gelu_by_erf", erf_gelu),
    Case("silu", F.silu),
    Case("silu_written_out", lambda x: x * torch.sigmoid(x)),
    Case("relu", F.relu),
    Case("leaky_relu", F.leaky_relu),
    Case("elu", F.elu),
    Case("softplus", F.softplus),
    Case("softplus_arguments", lambda x: F.softplus(x, beta=3, threshold=2)),
    Case("mish", F.mish),
    Case("celu", lambda x: F.celu(x, alpha=0.5)),
    Case("log_sigmoid", F.logsigmoid),
    Case("where_of_itself", lambda x: torch.where(x > 0.3, x, 0.1 * x**2)),
    Case("where_encrypted", lambda x, y: torch.where(x > 0, x, y), TWO),
    # A jump of 1.5 at 0, read in slots of a 256th of a range of 5: a value in the slot of the jump
    # is off by 0.75. Estimated, that is 0.08 of the deviation, rms.
    Case("masked_fill_encrypted", lambda x: x.masked_fill(x < 0, 1.5)),
    Case("sqrt_at_zero", lambda x: torch.sqrt(x.abs())),
    Case("log_near_zero", lambda x: torch.log(x - 0.49), positive=(0,)),
    Case("rsqrt_near_zero", lambda x: torch.rsqrt(x - 0.49) + x @ x.mT @ x / 10, positive=(0,)),
    Case("clamp", lambda x: x.clamp(-1, 1)),
    Case("abs", torch.abs),
    Case("sin", torch.sin),
    Case("hardtanh", F.hardtanh),
    Case("softmax", lambda x: x.softmax(-1)),
    Case("softmax_middle", lambda x: x.softmax(1)),
    Case("softmax_of_one", lambda x: x[..., :1].softmax(-1) + x),
    Case("softmax_vector", lambda x: x.softmax(0), ((5,),)),
    Case("softmax_masked", lambda x: x.masked_fill(~MASK, -torch.inf).softmax(-1)),
    Case("softmax_masked_finite", lambda x: x.masked_fill(~MASK, -1e9).softmax(-1)),
    Case("softmax_causal", lambda x: (x @ x.mT).masked_fill(~CAUSAL, -torch.inf).softmax(-1)),
    Case("log_softmax", lambda x: x.log_softmax(-1)),
    Case("layer_norm", nn.LayerNorm(6)),
    Case("layer_norm_plain", lambda x: F.layer_norm(x, (6,))),
    Case("layer_norm_two", lambda x: F.layer_norm(x, (4, 6))),
    Case("rms_norm", rms_norm),
    Case("rms_norm_module", nn.RMSNorm(6)),
    Case("group_norm", nn.GroupNorm(2, 4), ((1, 4, 6),)),
    Case("view", lambda x: x.view(2, 12)),
    Case("reshape", lambda x: x.reshape(-1, 2)),
    Case("flatten", lambda x: x.flatten()),
    Case("transpose", lambda x: x.transpose(1, 2)),
    Case("permute", lambda x: x.permute(2, 0, 1)),
    Case("slice", lambda x: x[:, 1:3, ::2]),
    Case("split", lambda x: x.split(3, -1)),
    Case("split_uneven", lambda x: x.split([1, 5], -1)),
    Case("chunk", lambda x: x.chunk(2, 1)),
    Case("unbind", lambda x: x.unbind(1)),
    Case("cat", lambda x, y: torch.cat([x, y], 1), TWO),
    Case("cat_clear", lambda x: torch.cat([x, V.expand(1, 1, 6)], 1)),
    Case("stack", lambda x, y: torch.stack([x, y], 1), TWO),
    Case("expand", lambda x: x.expand(3, 4, 6)),
    Case("repeat", lambda x: x.repeat(1, 2, 1)),
    Case("flip", lambda x: x.flip(-1)),
    Case("roll", lambda x: x.roll(1, -1)),
    Case("unsqueeze", lambda x: x.unsqueeze(-1)),
    Case("squeeze", lambda x: x.squeeze(0)),
    Case("select", lambda x: x[:, -1]),
    Case("index", lambda x: x[:, torch.tensor([2, 0])]),
    Case("index_repeats", lambda x: x[..., torch.tensor([2, 0, 2, -1])]),
    Case("index_two", lambda x: x[:, torch.tensor([2, 0]), torch.tensor([1, 5])]),
    Case("index_mask", lambda x: x[:, torch.tensor([True, False, True, True])]),
    Case("where", lambda x, y: torch.where(MASK, x, y), TWO),
    Case("where_clear", lambda x: torch.where(MASK, x, V)),
    Case("where_clear_first", lambda x: torch.where(MASK, V, x)),
    Case("masked_fill", lambda x: x.masked_fill(MASK, 0.5)),
    Case("tril", torch.tril),
    Case("attention", F.scaled_dot_product_attention, HEADS),
    Case(
        "attention_causal",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        HEADS,
    ),
    Case(
        "attention_masked",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASK[:, :4]),
        HEADS,
    ),
    Case(
        "attention_grouped",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        ((1, 2, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2)),
    ),
    Case("conv1d", _seeded(nn.Conv1d, 4, 3, 2), ((1, 4, 6),)),
    Case("conv2d_padded", _seeded(nn.Conv2d, 2, 3, 3, 1, 1), ((1, 2, 4, 4),)),
    Case("conv2d_strided", _seeded(nn.Conv2d, 2, 3, 2, 2), ((1, 2, 5, 4),)),
    Case("conv2d_dilated", _seeded(nn.Conv2d, 2, 3, 2, 1, 0, 2), ((1, 2, 4, 4),)),
    Case("conv2d_grouped", _seeded(nn.Conv2d, 4, 6, 3, 1, 1, 1, 2), ((1, 4, 3, 3),)),
    Case("conv3d", _seeded(nn.Conv3d, 1, 2, 2), ((1, 1, 2, 3, 3),)),
    Case("conv2d_transposed", _seeded(nn.ConvTranspose2d, 2, 3, 2, 2), ((1, 2, 3, 3),)),
    Case("batch_norm", lambda x: F.batch_norm(x, B[:4], V[:4], B[1:], V[2:]), ((1, 4, 6),)),
    Case("avg_pool1d", lambda x: F.avg_pool1d(x, 2)),
    Case("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1), IMAGE),
    Case("avg_pool2d_uncounted", lambda x: F.avg_pool2d(x, 2, 2, 1, False, False), IMAGE),
    Case("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (3, 2)), IMAGE),
    Case("max_pool1d", lambda x: F.max_pool1d(x, 2)),
    Case("max_pool2d", lambda x: F.max_pool2d(x, 2), IMAGE),
    Case("max_pool2d_padded", lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE),
    Case("max_pool2d_ceil", lambda x: F.max_pool2d(x, 3, 2, 0, 1, True), IMAGE),
    Case("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, (3, 2)), IMAGE),
    Case("upsample", lambda x: F.interpolate(x, scale_factor=2), IMAGE),
    Case("upsample_bilinear", lambda x: F.interpolate(x, size=(3, 5), mode="bilinear"), IMAGE),
    Case("pad", lambda x: F.pad(x, (1, 2), value=2.0)),
    Case("pad_and_cut", lambda x: F.pad(x, (-1, 2, 1, 0))),
    Case("pad_reflected", lambda x: F.pad(x, (1, 2), mode="reflect")),
    Case("maximum", torch.maximum, TWO),
    Case("maximum_clear", lambda x: torch.maximum(V - 2, x)),
    Case("minimum", torch.minimum, TWO),
    Case("minimum_clear", lambda x: torch.minimum(x, V - 2)),
    Case("amax", lambda x: x.amax(-1)),
    Case("max_dim", lambda x: x.max(1, keepdim=True).values),
    Case("min_dim", lambda x: x.min(1).values),
    Case("max_all", lambda x: x.max().view(1)),
    Case("logsumexp", lambda x: x.logsumexp(-1)),
    Case("cumsum", lambda x: x.cumsum(1)),
    Case("prod", lambda x: x.prod(1)),
    Case("vector_norm", lambda x: torch.linalg.vector_norm(x, dim=-1)),
    Case("normalize", lambda x: F.normalize(x, dim=-1)),
    Case("compared", lambda x, y: torch.where(x + 0 > 0, x, y * 0), TWO),
    Case("isnan", lambda x: torch.where(x.softmax(-1).isnan(), 0.0, x.softmax(-1))),
    Case("zeros_like", lambda x: torch.cat([x, torch.zeros_like(x)], 1)),
    Case("unfold", lambda x: x.unfold(2, 3, 2)),
    Case("gather", lambda x: x.gather(2, torch.tensor([[[0, 3], [1, 1], [5, 2], [0, 0]]]))),
    Case("diagonal", lambda x: x.diagonal(0, 1, 2)),
    Case("slice_scatter", lambda x, y: x.slice_scatter(y[..., :2], 2, 1, 3), TWO),
    Case("slice_scatter_clear", lambda x: torch.ones(4, 6).slice_scatter(x[0, :2], 0, 1, 3)),
    Case("index_put", lambda x, y: x.index_put((torch.tensor([0]),), y), TWO),
    Case("two_results", lambda x: (x.exp(), x.tanh() @ W)),
    Case("input_is_result", lambda x: (x, x.exp())),
    Case("result_twice", lambda x: (x.exp(), x.exp())),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_operator(case: Case) -> None:
    inputs = [
        seeded(s, seed=10 + i, positive=i in case.positive) for i, s in enumerate(case.shapes)
    ]
    program = program_from(case.function, list(zip(*inputs, strict=True)))
    expected, predicted = lower_with_prediction(program)
    found = run_integers(program, program.samples)
    for a, b, error in zip(expected, found, predicted, strict=True):
        assert a.shape == b.shape
        # Rounded weights and results, and what wraps, may at most double what roundings alone do.
        assert relative_error(a, b) < min(2 * error, 0.1)


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "tan": torch.tan,
    "asin": torch.asin,
    "acos": torch.acos,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "asinh": torch.asinh,
    "acosh": lambda x: torch.acosh(2 + x),
    "atanh": lambda x: torch.atanh(0.9 * x),
    "log10": lambda x: torch.log10(2 + x),
    "erfc": torch.erfc,
    "remainder": lambda x: torch.remainder(x, 0.3),
    "div_floor": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "div_trunc": lambda x: torch.div(x, V, rounding_mode="trunc"),
    "clamp_tensor": lambda x: torch.clamp(x, V - 2.5, V - 2),
    "hardshrink": F.hardshrink,
    "gt": lambda x: (x > V - 2).float(),
    "ge": lambda x: (x >= V - 2).float(),
    "lt": lambda x: (x > V - 2).float(),
    "le": lambda x: (x <= x.flip(0)).float(),
    "eq": lambda x: (x == x.flip(1)).float(),
    "ne": lambda x: (x != x.flip(1)).float(),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_elementwise_operator_is_lowered_as_it_is(name: str) -> None:
    """In float; steps meet no bound of relative error where rounding decides on which side."""
    x = torch.linspace(-0.9, 0.9, 24).view(4, 6)
    program = program_from(ELEMENTWISE[name], [(x,)])
    Pipeline((Normalize(), FuseMaps())).run(program)
    torch.testing.assert_close(program(x)[0], ELEMENTWISE[name](x))


def test_a_clamp_between_encrypted_bounds_is_refused_with_its_reason() -> None:
    x = torch.linspace(-0.9, 0.9, 24).view(4, 6)
    program = program_from(lambda x, low: torch.clamp(x, low), [(x, x - 1)])
    with pytest.raises(UnsupportedOpError, match=r"aten\.clamp\.Tensor .*its bounds are encrypted"):
        Normalize().run(program)

"""Bounds of single precision: met by any order of additions, and not much wider than needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own habit
from torch import Tensor, fx, nn

from fhe_fx.export.onnx.rounding import rounded_results


class _Layers(nn.Module):
    """Sums, normalizations, attention and functions, some of them deep."""

    def __init__(self, n: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.order = torch.randperm(n, generator=generator)
        self.weight = nn.Parameter(torch.randn(n, n, generator=generator) / n**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            y = F.layer_norm(x + 3, x.shape[-1:]) @ self.weight
            x = x + F.gelu(F.scaled_dot_product_attention(y, x, y))
        return x.softmax(-1).log()


class _InAnotherOrder(_Layers):
    """The same, every sum from another end and in parts."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, self.order]
        weight = self.weight[self.order][:, self.order]
        half = len(self.order) // 2
        for _ in range(4):
            z = F.layer_norm(x + 3, x.shape[-1:])
            y = z[:, half:] @ weight[half:] + z[:, :half] @ weight[:half]
            scores = y[:, half:] @ x[:, half:].T + y[:, :half] @ x[:, :half].T
            x = x + F.gelu((scores / x.shape[-1] ** 0.5).softmax(-1) @ y)
        return x.softmax(-1).log()[:, self.order.argsort()]


@pytest.mark.parametrize("n", [16, 256])
def test_another_order_of_additions_stays_within_the_bound(n: int) -> None:
    x = torch.randn(8, n, generator=torch.Generator().manual_seed(1))
    (result,) = rounded_results(fx.symbolic_trace(_Tuple(_Layers(n))), [x])
    with torch.no_grad():
        one, other = _Layers(n)(x), _InAnotherOrder(n)(x)
        exact = _Layers(n).double()(x.double())
    torch.testing.assert_close(result.exact, exact)
    difference = float((one - other).abs().max())
    assert 0 < difference <= result.bound
    # Worst cases, n u |a||b| at each of eight products, grow by the norms of weights behind them:
    # a bound of those is many thousand times the difference.
    assert result.bound < 100 * difference


class _Tuple(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


def test_what_rounds_nothing_has_no_room() -> None:
    def moved(x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return x.flip(0).reshape(-1), ids + 1, torch.where(x > 0, x, -x)

    x = torch.tensor([[1.0, -2.0], [torch.inf, 0.5]])
    found = rounded_results(fx.symbolic_trace(moved), [x, torch.arange(3)])
    assert [r.bound for r in found] == [0.0, 0.0, 0.0]
    assert torch.equal(found[0].exact, x.flip(0).reshape(-1).double())


def test_whole_numbers_are_told_as_they_were_before() -> None:
    def encoded(x: Tensor) -> tuple[Tensor, ...]:
        return ((x.double() * 3).round().clamp(-8, 7).long(),)

    x = torch.tensor([0.5, 1.4, 9.0])
    (result,) = rounded_results(fx.symbolic_trace(encoded), [x])
    torch.testing.assert_close(result.exact, x.double() * 3)
    assert 0 < result.bound < 1e-4

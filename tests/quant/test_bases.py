"""Bases of a contraction: exact in full, best of their rank, alike in every channel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fhe_fx.quant.bases import find_bases


def _values(seed: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixed = [draw(200, 2, channels) @ draw(channels, channels) for _ in range(2)]
    return mixed[0] + draw(channels), mixed[1]


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nhk,mhk->nmh", left, right)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9))
def test_all_directions_give_the_product_back(seed: int, channels: int) -> None:
    left, right = _values(seed, channels)
    a, b = find_bases(left, right).equalized(channels)
    found = _products(torch.einsum("nhk,hkr->nhr", left, a), torch.einsum("nhk,hkr->nhr", right, b))
    torch.testing.assert_close(found, _products(left, right), rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 9), st.data())
def test_fewer_directions_lose_least(seed: int, channels: int, data: st.DataObject) -> None:
    left, right = _values(seed, channels)
    rank = data.draw(st.integers(1, channels - 1))
    bases = find_bases(left, right)
    exact = _products(left, right)

    def lost(a: torch.Tensor, b: torch.Tensor) -> float:
        projected = torch.einsum("nhk,hkr,hjr->nhj", left, a, b)
        return float((_products(projected, right) - exact).square().sum())

    best = lost(*bases.kept(rank))
    plain = torch.eye(channels, dtype=torch.float64)[:, :rank].expand(2, -1, -1)
    assert best <= lost(plain, plain) * (1 + 1e-6)
    assert best == pytest.approx(lost(*bases.equalized(rank)), rel=1e-6, abs=1e-6)


def test_channels_vary_alike_at_every_rank() -> None:
    left, right = _values(0, 8)
    bases = find_bases(left, right)
    for rank in range(1, 9):
        a, b = bases.equalized(rank)
        spread = a.mT @ bases.left_spread @ a + b.mT @ bases.right_spread @ b
        energy = spread.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(energy, energy.mean(-1, keepdim=True).expand_as(energy))

"""Bases in which a product of two matrices needs few channels, all of them alike.

x y = (x A)(B^T y) for every A, B with A B^T = 1. Among those the singular vectors of the product of
both moments' roots put most of it into few channels, so that the others can be left out (Eckart and
Young 1936, "The approximation of one matrix by another of lower rank"). What is kept is rotated
until every channel varies alike, because the channels of a sum share one scale: any symmetric
matrix has a constant diagonal in some orthonormal basis (Schur and Horn).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Bases", "bases_of", "find_bases"]


@dataclass(frozen=True)
class Bases:
    """Bases of the channels of two operands, most important direction first, float64."""

    left: Tensor
    """`[*lead, K, K]`."""
    right: Tensor
    """`[*lead, K, K]`; `left @ right.mT` is one."""
    left_spread: Tensor
    """Covariance of the left operand, `[*lead, K, K]`."""
    right_spread: Tensor
    """Likewise."""

    def kept(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the first `rank` directions of both, `[*lead, K, rank]`."""
        return self.left[..., :rank], self.right[..., :rank]

    def equalized(self, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return the same, rotated so that the sum of both operands varies alike in each channel.

        Args:
            rank: how many directions are kept.
            seed: of the rotation from which the search begins.
        """
        left, right = self.kept(rank)
        spread = left.mT @ self.left_spread @ left + right.mT @ self.right_spread @ right
        flat = spread.reshape(-1, rank, rank)
        rotation = torch.stack([_equalizing(m, seed) for m in flat]).view(spread.shape)
        return left @ rotation, right @ rotation


def find_bases(left: Tensor, right: Tensor) -> Bases:
    """Find the bases for operands with these values.

    The expected square of what is left out, over independent rows of both, is least for each rank.

    Args:
        left: values of the left operand, `[n_values, *lead, K]`.
        right: values of the right operand's transpose, likewise; the leading dimensions are equal.
    """
    return dataclasses.replace(
        bases_of(_moment(left), _moment(right)),
        left_spread=_moment(left - left.mean(0)),
        right_spread=_moment(right - right.mean(0)),
    )


def bases_of(left: Tensor, right: Tensor) -> Bases:
    """Find the bases for operands with these mean outer products, `[*lead, K, K]`, float64."""
    root_left, root_right = _root(left), _root(right)
    u, s, vh = torch.linalg.svd(root_left @ root_right)
    size = s.clamp_min(1e-12 * float(s.max()) + 1e-30).rsqrt()
    # x A = x L^-1 U S^1/2, where x L^-1 is white; then A B^T = L^-1 U S V^T R^-1 = 1.
    return Bases(
        root_right @ vh.mT * size.unsqueeze(-2),
        root_left @ u * size.unsqueeze(-2),
        left,
        right,
    )


def _moment(values: Tensor) -> Tensor:
    """Return the mean outer product, `[*lead, K, K]`."""
    v = values.double().movedim(0, -2)
    moment: Tensor = v.mT @ v / v.shape[-2]
    return moment


def _root(moment: Tensor) -> Tensor:
    """Return the symmetric square root, with every direction present a little."""
    values, vectors = torch.linalg.eigh(moment)
    floor = 1e-6 * values.amax(-1, keepdim=True) + 1e-30
    values = values.maximum(floor).sqrt()
    root: Tensor = vectors * values.unsqueeze(-2) @ vectors.mT
    return root


def _equalizing(matrix: Tensor, seed: int) -> Tensor:
    """Return an orthonormal basis in which the diagonal of a symmetric matrix is constant.

    A random rotation brings it near; then each plane rotation brings one entry to the mean, so that
    as many as there are channels suffice (Chan and Li 1983, "Diagonal matrices and Hermitian
    matrices with given diagonals").
    """
    n = len(matrix)
    generator = torch.Generator().manual_seed(seed)
    basis: Tensor = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    m = basis.T @ matrix @ basis
    mean = m.trace() / n
    for _ in range(n - 1):
        i, j = int(m.diagonal().argmin()), int(m.diagonal().argmax())
        low, high, cross = mean - m[i, i], m[j, j] - mean, m[i, j]
        if float(min(low, high)) <= 1e-12 * float(mean.abs() + 1e-30):
            break
        # t = tan(angle) solves (m_ii - mean) + 2 t m_ij + t^2 (m_jj - mean) = 0.
        t = (-cross + (cross * cross + low * high).sqrt()) / high
        c = 1 / (1 + t * t).sqrt()
        plane = torch.eye(n, dtype=torch.float64)
        plane[i, i] = plane[j, j] = c
        plane[j, i], plane[i, j] = t * c, -t * c
        m, basis = plane.T @ m @ plane, basis @ plane
    return basis

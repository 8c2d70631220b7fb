"""Which elements must share a scale: connected components over the elements of a program.

A sum needs one scale for all it adds, a matrix product with clear weights one for all the rows that
share the weights; everything else is free. So the elements of all tensors are joined by exactly
these ties, and each component has a scale, a range and tables of its own. Where the model leaves
channels apart, per-channel quantization falls out; nothing asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import GATE, LINEAR, LOOKUP, SCALE, SHIFT
from fhe_fx.ir.views import Sum

if TYPE_CHECKING:
    from fhe_fx.ir.program import Program

__all__ = ["Classes", "absorbed_scales", "encodings", "find_classes", "is_exact_scale"]


@dataclass(frozen=True)
class Classes:
    """The scale class of every element of every encrypted node."""

    of: dict[fx.Node, Tensor]
    """Class numbers, of the node's shape."""
    n_classes: int
    """How many classes there are."""

    def extremes(self, node: fx.Node, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return least and greatest of `values` (`[n_samples, *shape]`) in each class."""
        index = self.of[node].reshape(-1).repeat(values.shape[0])
        flat = values.reshape(-1).double()
        low = torch.full((self.n_classes,), torch.inf, dtype=torch.float64)
        high = torch.full((self.n_classes,), -torch.inf, dtype=torch.float64)
        low.scatter_reduce_(0, index, flat, "amin")
        high.scatter_reduce_(0, index, flat, "amax")
        return low, high

    def moments(self, node: fx.Node, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of `values` in each class (nan where absent)."""
        index = self.of[node].reshape(-1).repeat(values.shape[0])
        flat = values.reshape(-1).double()
        zeros = torch.zeros(self.n_classes, dtype=torch.float64)
        count = zeros.scatter_add(0, index, torch.ones_like(flat))
        mean = zeros.scatter_add(0, index, flat) / count
        square = zeros.scatter_add(0, index, (flat - mean[index]) ** 2) / count
        return mean, square.sqrt()


def absorbed_scales(program: Program) -> dict[fx.Node, fx.Node]:
    """Find the scalings that need no integer operation, with the node that absorbs each.

    A factor without zeros, right behind an input that nothing else reads or right before a result
    that nothing else reads, is only a change of what the client's integers mean.
    """
    found: dict[fx.Node, fx.Node] = {}
    for node in program.calls(SCALE):
        x = d.input_node(node)
        if bool((d.constant(d.input_node(node, 1)) == 0).any()):
            continue
        if x.op == "placeholder" and len(x.users) == 1:
            found[node] = x
        elif all(u.op == "output" for u in node.users) and len(x.users) == 1:
            found[node] = node
    return found


def is_exact_scale(node: fx.Node) -> bool:
    """Say whether a node multiplies by integers, which needs no rounding and no new scale.

    A factor of one is not such a node: it stands where `untie-scales` wants a new scale.
    """
    if not d.is_call(node, SCALE):
        return False
    factor = d.constant(d.input_node(node, 1))
    return bool((factor == factor.round()).all()) and not bool((factor == 1).all())


def find_classes(program: Program) -> Classes:
    """Join the elements that must share a scale."""
    ids: dict[fx.Node, Tensor] = {}
    first: list[npt.NDArray[np.int64]] = []
    second: list[npt.NDArray[np.int64]] = []
    total = 0

    def fresh(like: Tensor) -> Tensor:
        """Give new numbers to the distinct values of `like`, in its shape."""
        nonlocal total
        _, inverse = torch.unique(like, return_inverse=True)
        result: Tensor = inverse + total
        total += int(inverse.max()) + 1 if inverse.numel() else 0
        return result

    def join(a: Tensor, b: Tensor) -> None:
        first.append(a.reshape(-1).numpy())
        second.append(b.reshape(-1).numpy())

    absorbed = absorbed_scales(program)
    for node in program.encrypted():
        shape = d.shape_of(node)
        inputs = [ids[n] for n in d.operands(node)]
        if node.op == "placeholder":
            channel = torch.arange(shape[-1]) if shape else torch.zeros((), dtype=torch.int64)
            ids[node] = fresh(channel.expand(shape))
        elif d.is_call(node, *d.STRUCTURAL):
            ids[node] = d.evaluate(node, *inputs)
        elif d.is_call(node, SHIFT, GATE) or node in absorbed or is_exact_scale(node):
            ids[node] = inputs[0]
        elif d.is_call(node, d.ADD, d.SUB):
            join(inputs[0], inputs[-1])
            ids[node] = inputs[0]
        elif d.is_call(node, d.SUM):
            dims = Sum.of(node).dims
            least = inputs[0].amin(dims, keepdim=True)
            join(least.expand(inputs[0].shape), inputs[0])
            ids[node] = least.reshape(shape)
        elif d.is_call(node, LINEAR):
            weight = d.constant(d.input_node(node, 1))
            rows = inputs[0]
            lead = rows.dim() - 2
            batch = (1,) * (lead - (weight.dim() - 2)) + tuple(weight.shape[:-2])
            for dim in range(rows.dim() - 1):
                # Batches align at the right: the weights may have more dimensions than the rows.
                if dim == lead or batch[dim - lead] == 1:
                    join(rows.narrow(dim, 0, 1).expand(rows.shape), rows)
            channel = torch.arange(weight[..., 0, :].numel()).view(*batch, 1, weight.shape[-1])
            ids[node] = fresh(channel.expand(shape))
        elif d.is_call(node, d.MUL):
            ids[node] = fresh(inputs[0] * (total + 1) + inputs[-1])
        elif d.is_map(node) or d.is_call(node, SCALE, LOOKUP):
            ids[node] = fresh(inputs[0])
        else:
            ids[node] = fresh(torch.zeros(shape, dtype=torch.int64))
    ones = np.ones(sum(len(a) for a in first), dtype=np.int8)
    a = np.concatenate(first) if first else np.empty(0, dtype=np.int64)
    b = np.concatenate(second) if second else np.empty(0, dtype=np.int64)
    n, labels = connected_components(coo_matrix((ones, (a, b)), shape=(total, total)), False)
    label = torch.from_numpy(labels.astype(np.int64))
    return Classes({node: label[numbers] for node, numbers in ids.items()}, n)


def encodings(program: Program) -> dict[fx.Node, int]:
    """Number the encodings: nodes tied by affine operators have ciphertexts of one encoding."""
    number: dict[fx.Node, int] = {}
    parent: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for node in program.encrypted():
        number[node] = len(parent)
        parent.append(number[node])
        if not d.is_map(node) and not d.is_call(node, LOOKUP):
            for source in (n for n in d.operands(node) if not d.is_clear(n)):
                parent[root(number[source])] = root(number[node])
    return {node: root(i) for node, i in number.items()}

"""How a call of a submodule maps to the inputs and results of its region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Signature", "keyed_leaves"]


def keyed_leaves(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Flatten a call; each leaf under a name such as `args[0]` or `kwargs['attention_mask']`."""
    found: dict[str, Any] = {}
    for name, tree in (("args", tuple(args)), ("kwargs", dict(kwargs))):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            found[name + pytree.keystr(path)] = leaf
    return found


@dataclass(frozen=True)
class Signature:
    """How a call of the submodule maps to the region, as recorded on the example."""

    encrypted: tuple[str, ...]
    """Name of the argument that each encrypted input is."""
    others: dict[str, Any]
    """The other arguments of the recorded call; the circuit holds their values as constants."""
    results: tuple[int, ...]
    """Leaf of the output that each result of the region is."""
    output: Any
    """The recorded output, whose structure is returned; None for tensors that nothing reads."""
    clear: Mapping[str, float] = field(default_factory=dict)
    """Those of `encrypted` that the server may see, and the least value that calibration gave."""

    def structured(self, results: Sequence[Tensor], *, is_as_recorded: bool) -> Any:
        """Return results of the region in the structure that the submodule returns.

        Args:
            results: of the region.
            is_as_recorded: whether they have the recorded shapes. Otherwise other tensors of the
                output, which are constants of those shapes, are None.
        """
        leaves, spec = pytree.tree_flatten(self.output)
        if not is_as_recorded:
            leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for leaf, result in zip(self.results, results, strict=True):
            leaves[leaf] = result
        return pytree.tree_unflatten(leaves, spec)

"""Arrays out of a file as calls of a graph, which takes inputs of fixed names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, fx

from fhe_fx.errors import CalibrationError, did_you_mean

__all__ = ["calls_of_graph", "inputs_of_graph"]


def inputs_of_graph(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return the tensors that a graph takes, by name; of each, shape and type count."""
    places = (n for n in graph.graph.nodes if n.op == "placeholder")
    return {str(n.target): v for n in places if isinstance(v := n.meta.get("val"), Tensor)}


def calls_of_graph(
    path: Path, arrays: Mapping[str, Tensor], graph: fx.GraphModule
) -> list[dict[str, Tensor]]:
    """Make a call of a graph of each row of the arrays.

    Args:
        path: where they come from, for messages.
        arrays: `[n, *shape of an input]` by the name of the input; a leading batch of one may be
            left out.
        graph: takes them.

    Raises:
        CalibrationError: if an input has no array, an array no input, or rows another shape.
    """
    inputs = inputs_of_graph(graph)
    told = f"The graph takes {', '.join(f'{n} {list(x.shape)}' for n, x in inputs.items())}."
    for name in (n for n in arrays if n not in inputs):
        near = did_you_mean(name, list(inputs))
        raise CalibrationError(f"{path}: the graph has no input {name!r}.{near} {told}")
    for name, given in inputs.items():
        if name not in arrays:
            raise CalibrationError(
                f"{path} holds no array for the input {name!r}. {told} Give a .npz with an array "
                f"for each."
            )
        row = tuple(arrays[name].shape[1:])
        if tuple(given.shape) not in {row, (1, *row)}:
            raise CalibrationError(f"{path}: rows of {name!r} have shape {list(row)}. {told}")
    return [
        {
            n: row.reshape(inputs[n].shape).to(inputs[n].dtype)
            for n, row in zip(arrays, rows, strict=True)
        }
        for rows in zip(*arrays.values(), strict=True)
    ]

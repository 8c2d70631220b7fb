"""The float program of which an integer program is the image, node by node.

The pipeline is run again up to the pass that makes integers. Then each float node is tagged, in the
provenance that passes hand on to what they emit, so each integer node says which it came from.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import fx

from fhe_fx.errors import PassError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pipeline
from fhe_fx.runtime.region import Region

__all__ = ["Twins", "twins_of"]

_TAG = " \N{SYMBOL FOR UNIT SEPARATOR} "
"""Parts a source line from the name of a float node; it occurs in no source line."""


@dataclass(frozen=True)
class Twins:
    """A region in float and in integers, and which nodes correspond."""

    exact: Program
    """In float, after every rewrite."""
    integers: Program
    """The integer program."""
    counterpart: dict[str, str]
    """By the name of an integer node: the float node whose value it holds."""


def twins_of(region: Region) -> Twins:
    """Lower a region again, and keep the float program beside the integers.

    Raises:
        PassError: if no pass of the region's pipeline makes integers.
    """
    passes = list(region.pipeline)
    first = next((i for i, p in enumerate(passes) if "integer" in p.gives), None)
    if first is None:
        raise PassError(f"{region.name}: no pass of the pipeline lowers to integers.")
    exact = copy.deepcopy(region.captured)
    Pipeline(tuple(passes[:first])).run(exact)
    integers = copy.deepcopy(exact)
    for node in integers.encrypted():
        node.meta["source"] = f"{node.meta.get('source', '')}{_TAG}{node.name}"
    Pipeline(tuple(passes[first:])).run(integers)
    tags: dict[fx.Node, str] = {}
    for node in integers.encrypted():
        node.meta["source"], _, tags[node] = str(node.meta.get("source", "")).partition(_TAG)
    by_name = {n.name: n for n in exact.encrypted()}
    counterpart = {
        node.name: _value_of(node, tags, by_name[tag])
        for node, tag in tags.items()
        if tag in by_name and "is_zero" not in node.meta
    }
    return Twins(exact, integers, counterpart)


def _value_of(node: fx.Node, tags: dict[fx.Node, str], origin: fx.Node) -> str:
    """Return the float node whose value an integer node holds.

    A map becomes a look-up, or the mean of several, with affine nodes before it that prepare what
    it reads.
    """
    if not d.is_map(origin):
        return origin.name
    while not d.is_call(node, LOOKUP):
        operands = d.operands(node)
        if not operands or tags[operands[0]] != origin.name:
            return d.input_node(origin).name
        node = operands[0]
    return origin.name

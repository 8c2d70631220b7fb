"""One encrypted region on its way from float operators to integers and tables."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from fhe_fx.ir import dialect as d
from fhe_fx.ir.batch import BatchInterpreter
from fhe_fx.ir.build import Builder
from fhe_fx.options import Options

__all__ = ["Note", "Program"]


@dataclass(frozen=True)
class Note:
    """Why a pass left something as it was."""

    made_by: str
    """Name of the pass."""
    node: str
    """Name of the node."""
    reason: str
    """One sentence."""


@dataclass
class Program:
    """A graph of one of the two stages, with what the passes know about it.

    The graph is a plain `torch.fx.GraphModule`: `program(*inputs)` runs it, and after every pass
    it still computes the same function, exactly or within what the pass states.
    """

    module: fx.GraphModule
    """The graph. Its placeholders are the encrypted inputs."""
    name: str = "region"
    """Module path of the region, as messages and reports quote it."""
    options: Options = field(default_factory=Options)
    """How to quantize and compile it."""
    samples: list[tuple[Tensor, ...]] = field(default_factory=list)
    """Calibration values of the inputs, one tuple a sample."""
    observed: dict[str, Tensor] = field(default_factory=dict)
    """Value of every float node on the samples, `[n_samples, *shape]`, by node name."""
    properties: set[str] = field(default_factory=lambda: {"captured"})
    """Facts that passes have established: see `passes.base`."""
    left_out: float = 0.0
    """Mean squared error of the results that passes made by leaving something out, in parts of the
    results' variance, on the samples. A `max_error` is what is allowed with it."""
    notes: list[Note] = field(default_factory=list)
    """Rewrites that were declined, with the reason."""
    sources: dict[str, int] = field(default_factory=dict)
    """Which of the original inputs each placeholder receives; several may share one."""

    @property
    def graph(self) -> fx.Graph:
        """The fx graph."""
        return self.module.graph

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on one value for each original input."""
        with torch.no_grad():
            result = self.module(*[inputs[self.source_of(n)] for n in self.placeholders])
        return tuple(result)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The encrypted inputs, in order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def source_of(self, placeholder: fx.Node) -> int:
        """Return the number of the original input that a placeholder receives."""
        if placeholder.name in self.sources:
            return self.sources[placeholder.name]
        return self.placeholders.index(placeholder)

    @property
    def output_node(self) -> fx.Node:
        """The fx output node."""
        return cast(fx.Node, next(iter(reversed(self.graph.nodes))))

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that the region returns, in order; one may occur twice."""
        return list(self.output_node.args[0])  # type: ignore[arg-type]

    def calls(self, *targets: object) -> list[fx.Node]:
        """List the nodes that call one of the operators `targets`, in order."""
        return [n for n in self.graph.nodes if d.is_call(n, *targets)]

    def maps(self) -> list[fx.Node]:
        """List the nodes that apply an elementwise function, in order."""
        return [n for n in self.graph.nodes if d.is_map(n)]

    def encrypted(self) -> Iterator[fx.Node]:
        """Iterate over the nodes whose value depends on the inputs, in order."""
        return (n for n in list(self.graph.nodes) if d.is_encrypted(n))

    def before(self, node: fx.Node, made_by: object = "", origin: fx.Node | None = None) -> Builder:
        """Return a builder that writes before `node` and inherits its provenance."""
        return Builder(self.module, node, origin, str(getattr(made_by, "name", made_by)))

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` read `new`, and drop `old`."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def note(self, made_by: object, node: fx.Node, reason: str) -> None:
        """Record why a pass left `node` alone."""
        note = Note(str(getattr(made_by, "name", made_by)), node.name, reason)
        if note not in self.notes:
            self.notes.append(note)

    def drop_unread(self) -> None:
        """Drop the nodes that nothing reads: what a pass needs between two of its own steps."""
        for node in reversed(list(self.graph.nodes)):
            if node.op not in {"placeholder", "output"} and not node.users:
                self.graph.erase_node(node)

    def clean(self) -> None:
        """Drop dead nodes and unused constants, and recompile."""
        self.drop_unread()
        self.module.delete_all_unused_submodules()
        used = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        for name in [n for n, _ in self.module.named_buffers(recurse=False) if n not in used]:
            delattr(self.module, name)
        self.graph.lint()
        self.module.recompile()

    def values(
        self, samples: Sequence[Sequence[Tensor]], names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Run on samples and return the value of encrypted nodes.

        Args:
            samples: one value for each original input, a sample.
            names: nodes whose values are wanted; all without it.

        Returns:
            `[n_samples, *shape]`, by node name.
        """
        recorder = _Recorder(self.module, names)
        with torch.no_grad():
            recorder.run(*self.stacked(samples))
        return recorder.found

    def stacked(self, samples: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the value of each placeholder on samples, `[n_samples, *shape]`."""
        inputs = [torch.stack(values) for values in zip(*samples, strict=True)]
        return [inputs[self.source_of(n)] for n in self.placeholders]

    def __str__(self) -> str:
        from fhe_fx.ir.printer import format_program

        return format_program(self)


class _Recorder(BatchInterpreter):
    """Runs a graph and keeps the value of each encrypted node."""

    def __init__(self, module: fx.GraphModule, names: Collection[str] | None) -> None:
        super().__init__(module)
        self.names = names
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if d.is_encrypted(n) and (self.names is None or n.name in self.names):
            self.found[n.name] = value
        return value

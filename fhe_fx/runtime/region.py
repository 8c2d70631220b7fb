"""One compiled part of a model: client prefix, circuit, client suffix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, fx

from fhe_fx.backends.base import Circuit, CircuitFacts, Integers
from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.errors import ArtifactError, BitWidthError, FheFxError
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pipeline
from fhe_fx.passes.partition import ENCRYPTED
from fhe_fx.quant.calibration import Call
from fhe_fx.runtime.causality import causal_axes
from fhe_fx.runtime.codec import Codec

__all__ = ["MODES", "Region", "Remote"]

MODES = ("disable", "clear", "simulate", "execute", "remote")
"""Float; integers by the reference; with modelled noise; encrypted here; encrypted elsewhere."""


class Remote(Protocol):
    """A circuit that another machine runs."""

    def execute(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Encrypt, have it run, decrypt."""


@dataclass
class Region:
    """A part of a model, lowered, with what is needed to run it."""

    name: str
    """Dotted path of the submodule."""
    target: Program
    """The submodule in float, normalized: what the integers approximate."""
    composed: fx.GraphModule
    """Prefix, encrypted region and suffix; only the parts that exist are called."""
    captured: Program
    """The encrypted region in float, before any pass."""
    program: Program
    """The encrypted region in integers."""
    pipeline: Pipeline
    """What lowered it."""
    input_shapes: tuple[tuple[int, ...], ...]
    """Shape of each encrypted input of the submodule, for one sample."""
    call: Call | None = None
    """The call of the model with which it was captured, where there is a model."""
    remote: Remote | None = None
    """Who runs it in mode "remote"; `fhe_fx.connect` says so."""
    _circuit: Circuit | None = None
    _causal: dict[tuple[int, ...], dict[int, int] | None] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, object]) -> Region:
        """Share it: nothing in it changes, and a circuit with its keys cannot be copied."""
        return self

    def __reduce__(self) -> str:
        """Refuse to be pickled: fx graphs lose their types and circuits their keys on the way.

        Raises:
            ArtifactError: always.
        """
        raise ArtifactError(
            f"{self.name}: an encrypted part cannot be pickled. Save the float model (its "
            f"state_dict has the same names) and encrypt it again, or write the circuit with "
            f"`fhe-fx export`."
        )

    @property
    def is_compiled(self) -> bool:
        """Whether a circuit has been made."""
        return self._circuit is not None

    @property
    def facts(self) -> CircuitFacts | None:
        """What the circuit costs, once compiled."""
        return self._circuit.facts if self._circuit is not None else None

    def circuit(self) -> Circuit:
        """Return the Concrete circuit, compiling it at the first call.

        Raises:
            BitWidthError: if no parameters exist; names the widest look-up and what would compile.
        """
        if self._circuit is None:
            from fhe_fx.backends.concrete import ConcreteBackend

            try:
                self._circuit = ConcreteBackend().compile(self.program)
            except BitWidthError as error:
                raise BitWidthError(f"{error}\n{self._advice()}") from error
        return self._circuit

    def _advice(self) -> str:
        """Find the smallest change of n_bits with which the region compiles."""
        from fhe_fx.backends.concrete import ConcreteBackend

        options = self.program.options
        for n_bits in range(options.n_bits - 1, 0, -1):
            smaller = copy.deepcopy(self.captured)
            smaller.options = replace(options, n_bits=n_bits)
            try:
                self.pipeline.run(smaller)
                facts = ConcreteBackend().compile(smaller).facts
            except FheFxError:
                continue
            return f"Try n_bits={n_bits}: it compiles, with keys of {facts.key_bytes / 1e9:.1f} GB."
        return "No smaller n_bits compiles either. Encrypt a smaller part."

    def causal(self, row_axes: Sequence[int]) -> dict[int, int] | None:
        """Return the row axis of each result if the region is causal, as proved on its graph.

        Args:
            row_axes: the axis of each encrypted input that holds its rows.
        """
        key = tuple(row_axes)
        if key not in self._causal:
            self._causal[key] = causal_axes(self.target, key)
        return self._causal[key]

    def run_float(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the submodule in float, as captured."""
        return self.target(*[x.detach().float() for x in inputs])

    def run(self, inputs: Sequence[Tensor], mode: str) -> tuple[Tensor, ...]:
        """Run one sample: the client's float parts, and the circuit in between.

        Args:
            inputs: one tensor for each encrypted input of the submodule.
            mode: "clear", "simulate", "execute" or "remote".
        """
        return self.run_many([inputs], mode)[0]

    def run_many(self, samples: Sequence[Sequence[Tensor]], mode: str) -> list[tuple[Tensor, ...]]:
        """Run several samples; in mode "clear" they go through the circuit together."""
        with torch.no_grad():
            runs = [_Composed(self.composed) for _ in samples]
            inputs = [
                run.until_circuit([x.detach().float().cpu() for x in sample])
                for run, sample in zip(runs, samples, strict=True)
            ]
            results = self.run_circuits(inputs, mode)
            return [run.from_circuit(r) for run, r in zip(runs, results, strict=True)]

    def run_circuit(self, inputs: Sequence[Tensor], mode: str) -> list[Tensor]:
        """Quantize, run the circuit in one of its modes, and return real results."""
        return self.run_circuits([inputs], mode)[0]

    def run_circuits(self, samples: Sequence[Sequence[Tensor]], mode: str) -> list[list[Tensor]]:
        """Do the same for several samples."""
        codec = Codec.of(self.program)
        encoded = [codec.encode(inputs) for inputs in samples]
        if mode == "clear":
            found = ReferenceBackend().compile(self.program).clear_many(encoded)
        else:
            run = self._runner(mode)
            found = [run(inputs) for inputs in encoded]
        return [codec.decode(results) for results in found]

    def _runner(self, mode: str) -> Callable[[Sequence[Integers]], list[Integers]]:
        if mode == "remote":
            assert self.remote is not None, "the mode was not checked"
            return self.remote.execute
        return self.circuit().simulate if mode == "simulate" else self.circuit().execute


class _Composed(fx.Interpreter):
    """Runs prefix and suffix in float, and stops in between for the encrypted region."""

    def __init__(self, composed: fx.GraphModule) -> None:
        super().__init__(composed, garbage_collect_values=False)
        self._nodes = iter(composed.graph.nodes)

    def until_circuit(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the prefix and return what enters the circuit."""
        self.args_iter = iter(inputs)
        for node in self._nodes:
            if node.op == "call_module" and node.target == ENCRYPTED:
                self._encrypted = node
                return tuple(fx.node.map_arg(node.args, self.env.__getitem__))
            self.env[node] = self.run_node(node)
        raise AssertionError("partition made no encrypted part")

    def from_circuit(self, results: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the suffix and return the submodule's results."""
        self.env[self._encrypted] = results
        for node in self._nodes:
            self.env[node] = self.run_node(node)
        return tuple(self.env[node])

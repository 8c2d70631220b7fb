"""One compiled part of a model: client prefix, circuit, client suffix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, fx

from fhe_fx.backends.base import CircuitFacts, Integers
from fhe_fx.backends.reference import ReferenceBackend
from fhe_fx.errors import ArtifactError, BitWidthError, FheFxError
from fhe_fx.ir.program import Program
from fhe_fx.passes.base import Pipeline
from fhe_fx.passes.partition import ENCRYPTED
from fhe_fx.quant.calibration import Call
from fhe_fx.runtime.causality import causal_axes, causal_axes_under, in_pairs
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.ranges import RangeWatch

if TYPE_CHECKING:
    from fhe_fx.backends.concrete import ConcreteCircuit
    from fhe_fx.runtime.keyring import Keyring

__all__ = ["MODES", "Region", "Remote", "as_given", "run_composed"]

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
    tokens: int | None = None
    """Tokens of the model inputs that it was captured with; None if those are no tokens."""
    keyring: Keyring | None = None
    """With which others it shares keys, where their parameters allow it."""
    call: Call | None = None
    """The call of the model with which it was captured, where there is a model."""
    remote: Remote | None = None
    """Who runs it in mode "remote"; `fhe_fx.connect` says so."""
    watch: RangeWatch | None = None
    """Counts, in mode "clear", the values that were outside their range, where it is wanted."""
    _circuit: ConcreteCircuit | None = None
    _causal: dict[tuple[int, ...], dict[int, int] | None] = field(default_factory=dict)
    _pairs: Program | None = None

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
    def circuit_name(self) -> str:
        """Dotted path, and the heads if some were chosen; circuits are known by it."""
        return self.program.name

    @property
    def codec(self) -> Codec:
        """Encodings of the circuit's inputs and results."""
        return Codec.of(self.program)

    @property
    def is_compiled(self) -> bool:
        """Whether a circuit has been made."""
        return self._circuit is not None

    @property
    def facts(self) -> CircuitFacts | None:
        """What the circuit costs, once compiled."""
        return self._circuit.facts if self._circuit is not None else None

    def circuit(self) -> ConcreteCircuit:
        """Return the Concrete circuit, compiling it, and those of its keyring, at the first call.

        Raises:
            BitWidthError: if no parameters exist; names the widest look-up and what would compile.
        """
        if self._circuit is None:
            if self.keyring is None:
                self.use(self.compiled())
            else:
                self.keyring.compile()
        assert self._circuit is not None
        return self._circuit

    def compiled(self) -> ConcreteCircuit:
        """Compile a circuit for itself, with keys of its own; `circuit` is what to run.

        Raises:
            BitWidthError: as `circuit`.
        """
        from fhe_fx.backends.concrete import ConcreteBackend

        try:
            return ConcreteBackend().compile(self.program)
        except BitWidthError as error:
            raise BitWidthError(f"{error}\n{self._advice()}") from error

    def use(self, circuit: ConcreteCircuit) -> None:
        """Run this circuit from now on."""
        self._circuit = circuit

    def _advice(self) -> str:
        """Find the smallest change of n_bits with which the region compiles."""
        from fhe_fx.backends.concrete import ConcreteBackend

        options = self.captured.options
        for n_bits in range(options.n_bits - 1, 0, -1):
            smaller = copy.deepcopy(self.captured)
            smaller.options = replace(options, n_bits=n_bits, max_error=None, max_cost=None)
            try:
                self.pipeline.run(smaller)
                facts = ConcreteBackend().compile(smaller).facts
            except FheFxError:
                continue
            return f"Try n_bits={n_bits}: it compiles, with keys of {facts.key_bytes / 1e9:.1f} GB."
        return "No smaller n_bits compiles either. Encrypt a smaller part."

    def watched(self) -> RangeWatch:
        """Count from now on, in mode "clear", the values that are outside their range."""
        self.watch = RangeWatch(self.program)
        return self.watch

    def causal(self, row_axes: Sequence[int]) -> dict[int, int] | None:
        """Return the row axis of each result if the region is causal, as proved on its graph.

        Args:
            row_axes: the axis of each encrypted input that holds its rows.
        """
        key = tuple(row_axes)
        if key not in self._causal:
            self._causal[key] = causal_axes(self.target, key)
        return self._causal[key]

    def causal_under(
        self, row_axes: Sequence[int | None], clear: Mapping[int, Tensor], given: int
    ) -> dict[int, int] | None:
        """Return the same for one call, whose clear inputs may hide rows.

        Args:
            row_axes: as in `causal`; None for clear inputs.
            clear: value of each clear input by number, as long as the circuit.
            given: rows of the call; those from there on were appended.
        """
        if self._pairs is None:
            self._pairs = in_pairs(self.target)
        return causal_axes_under(self._pairs, row_axes, clear, given)

    def run_float(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the submodule in float, as captured."""
        return self.target(*[as_given(x) for x in inputs])

    def run(self, inputs: Sequence[Tensor], mode: str) -> tuple[Tensor, ...]:
        """Run one sample: the client's float parts, and the circuit in between.

        Args:
            inputs: one tensor for each encrypted input of the submodule.
            mode: "clear", "simulate", "execute" or "remote".
        """
        return self.run_many([inputs], mode)[0]

    def run_many(self, samples: Sequence[Sequence[Tensor]], mode: str) -> list[tuple[Tensor, ...]]:
        """Run several samples; in mode "clear" they go through the circuit together."""
        return run_composed(self.composed, samples, lambda inputs: self.run_circuits(inputs, mode))

    def run_circuit(self, inputs: Sequence[Tensor], mode: str) -> list[Tensor]:
        """Quantize, run the circuit in one of its modes, and return real results."""
        return self.run_circuits([inputs], mode)[0]

    def run_circuits(self, samples: Sequence[Sequence[Tensor]], mode: str) -> list[list[Tensor]]:
        """Do the same for several samples."""
        if mode == "clear" and self.watch is not None:
            return self.watch.run(samples)
        codec = self.codec
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


def as_given(x: Tensor) -> Tensor:
    """Return an input of a region: numbers in single precision, integers as they are."""
    return x.detach().float() if x.is_floating_point() else x.detach()


def run_composed(
    composed: fx.GraphModule,
    samples: Sequence[Sequence[Tensor]],
    circuit: Callable[[list[tuple[Tensor, ...]]], Sequence[Sequence[Tensor]]],
) -> list[tuple[Tensor, ...]]:
    """Run samples through prefix, circuit and suffix.

    Args:
        composed: calls the three.
        samples: for each, one tensor for each encrypted input of the submodule.
        circuit: given what enters the circuit for each sample, returns what leaves it.
    """
    with torch.no_grad():
        runs = [_Composed(composed) for _ in samples]
        inputs = [
            run.until_circuit([as_given(x).cpu() for x in sample])
            for run, sample in zip(runs, samples, strict=True)
        ]
        return [run.from_circuit(r) for run, r in zip(runs, circuit(inputs), strict=True)]


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

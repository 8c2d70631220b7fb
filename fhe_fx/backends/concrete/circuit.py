"""Compiles an integer program with Concrete, and runs it clear, simulated or encrypted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from concrete import fhe
from torch import fx

from fhe_fx.backends.base import CircuitFacts, Integers
from fhe_fx.backends.concrete.constants import constants_as_bytes
from fhe_fx.backends.concrete.emit import as_declared, emit_function
from fhe_fx.backends.concrete.folders import owned_folders
from fhe_fx.errors import BackendError, BitWidthError, InputError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.ops import LOOKUP, ROUND
from fhe_fx.ir.printer import format_program
from fhe_fx.ir.program import Program
from fhe_fx.ir.types import ValueType, as_decrypted
from fhe_fx.ir.views import Lookup, Round

__all__ = ["ConcreteBackend", "ConcreteCircuit"]


class ConcreteBackend:
    """Compiles integer programs to TFHE circuits of 128-bit security."""

    name = "concrete"

    def compile(self, program: Program) -> ConcreteCircuit:
        """Compile.

        Raises:
            BitWidthError: if no parameters exist for the widths; names the widest look-up.
            BackendError: if Concrete refuses the program for another reason.
        """
        return _compile(program)

    def rekeyed(self, circuit: ConcreteCircuit, keys_from: ConcreteCircuit) -> ConcreteCircuit:
        """Return a circuit that does the same with the keys of another.

        The optimizer then takes the other's parameters. Where they do not fit, the circuit itself
        is returned, with keys of its own.
        """
        if circuit is keys_from:
            return circuit
        if circuit.keyset != keys_from.keyset:
            try:
                again = _compile(circuit.program, keys_from.keyset.get_restriction())
            except (BitWidthError, BackendError):
                return circuit
            if again.keyset != keys_from.keyset:
                return circuit
            circuit = again
        circuit.share_keys(keys_from)
        return circuit


def _compile(program: Program, restriction: Any = None) -> ConcreteCircuit:
    names = [n.name for n in program.placeholders]
    probe = tuple(np.zeros(d.shape_of(n), dtype=np.int64) for n in program.placeholders)
    configuration = fhe.Configuration(
        p_error=program.options.chosen_p_error,
        compress_input_ciphertexts=True,
        compress_evaluation_keys=True,  # a fifth of the size, made whole again in a second
        show_graph=False,
        show_mlir=False,
        show_optimizer=False,
        show_progress=False,
        verbose=False,
        dump_artifacts_on_unexpected_failures=False,
        use_insecure_key_cache=False,
        keyset_restriction=restriction,
    )
    function = emit_function(program)
    function.__signature__ = _signature(names)  # type: ignore[attr-defined]
    seen = ["clear" if d.is_clear(n) else "encrypted" for n in program.placeholders]
    compiler = fhe.Compiler(function, dict(zip(names, seen, strict=True)))
    start = time.perf_counter()
    try:
        with owned_folders() as keep, as_declared(), constants_as_bytes():
            circuit = compiler.compile([probe if len(probe) > 1 else probe[0]], configuration)
            keep(circuit.server)
    except RuntimeError as error:
        raise _explain(program, error) from error
    seconds = time.perf_counter() - start
    return ConcreteCircuit(program, circuit, seconds)


def _signature(names: Sequence[str]) -> Any:
    import inspect

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, kind) for name in names])


def _explain(program: Program, error: RuntimeError) -> Exception:
    text = str(error).strip().splitlines()
    if not any(word in str(error) for word in ("NoParametersFound", "bit", "Unfeasible")):
        return BackendError(f"{program.name}: Concrete refused the program: {' '.join(text[:3])}")
    look_ups = [(Lookup.of(n), n) for n in program.calls(LOOKUP)]
    if not look_ups:
        return BackendError(f"{program.name}: Concrete refused the program: {' '.join(text[:3])}")
    view, widest = max(look_ups, key=lambda pair: (pair[0].bits, pair[0].lsbs))
    source: ValueType = view.x.meta["type"]
    return BitWidthError(
        f"{program.name}: no parameters of 128-bit security exist for this circuit. Its widest "
        f"look-up reads {view.bits} of {source.bits} bits "
        f"({widest.meta.get('module_path', '')}, {widest.meta.get('source', '')}).\n"
        f"{format_program(program, {widest})}"
    )


class ConcreteCircuit:
    """A compiled circuit, with the keys of this process once something is executed."""

    def __init__(self, program: Program, circuit: Any, compile_seconds: float) -> None:
        self.program, self._circuit = program, circuit
        self._has_keys = False
        self._keys_from: ConcreteCircuit | None = None
        self._simulator: Any = None
        self._facts = _facts(program, circuit, compile_seconds)

    def __deepcopy__(self, memo: dict[int, Any]) -> ConcreteCircuit:
        """Share: a compiled circuit is immutable, and its keys must not be copied."""
        return self

    @property
    def facts(self) -> CircuitFacts:
        """What it costs."""
        return self._facts

    @property
    def keyset(self) -> Any:
        """The parameters of its keys; circuits in which they are equal can share keys."""
        return self._circuit.client.specs.program_info.get_keyset_info()

    def share_keys(self, other: ConcreteCircuit) -> None:
        """Use the keys of a circuit of equal keyset."""
        self._keys_from, self._has_keys = other, False
        self._facts = replace(self._facts, has_own_keys=False)

    def _check(self, inputs: Sequence[Integers]) -> None:
        for node, x in zip(self.program.placeholders, inputs, strict=True):
            value_type: ValueType = node.meta["type"]
            if x.shape != d.shape_of(node):
                raise InputError(
                    f"{self.program.name}: input {node.name} has shape {x.shape}; the circuit "
                    f"takes {d.shape_of(node)}."
                )
            if x.size and (x.min() < value_type.low or x.max() > value_type.high):
                raise InputError(
                    f"{self.program.name}: input {node.name} holds {x.min()} to {x.max()}; the "
                    f"circuit takes {value_type.low} to {value_type.high}."
                )

    @staticmethod
    def _list(results: Any) -> list[Integers]:
        many = results if isinstance(results, tuple) else (results,)
        return [np.asarray(r, dtype=np.int64) for r in many]

    def _read(self, results: list[Integers], *, is_rounded: bool = True) -> list[Integers]:
        """Return what the program does; Concrete's graph keeps the place of bits rounded away."""

        def read(x: Integers, n: fx.Node) -> Integers:
            if not d.is_call(n, ROUND):
                return x
            result = Round.of(n)
            return as_decrypted(x if is_rounded else x >> result.lsbs, result.bits)

        return [read(x, n) for x, n in zip(results, self.program.results, strict=True)]

    def clear(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Evaluate Concrete's own graph in the clear."""
        self._check(inputs)
        return self._read(self._list(self._circuit.graph(*inputs)), is_rounded=False)

    def simulate(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Run the compiled circuit on plain integers with modelled noise."""
        self._check(inputs)
        self.simulator()
        return self._read(self._list(self._circuit.simulate(*inputs)))

    def simulator(self) -> Any:
        """Return Concrete's server that simulates, compiled when it is first asked for."""
        if self._simulator is None:
            with owned_folders() as keep:
                self._circuit.enable_fhe_simulation()
                self._simulator = self._circuit.simulator
                keep(self._simulator)
        return self._simulator

    def keygen(self) -> None:
        """Make keys for this process, unless there are some."""
        if self._has_keys:
            return
        if self._keys_from is None:
            self._circuit.keygen()
        else:
            self._keys_from.keygen()
            self._circuit.keys = self._keys_from._circuit.keys
        self._has_keys = True

    def execute(self, inputs: Sequence[Integers]) -> list[Integers]:
        """Encrypt, run and decrypt with the keys of this process."""
        self._check(inputs)
        self.keygen()
        return self._read(self._list(self._circuit.encrypt_run_decrypt(*inputs)))

    def save(self, client: Path, server: Path) -> None:
        """Write the client's specifications and the server's circuit, each to its own file."""
        self._circuit.client.save(client)
        self._circuit.server.save(server, via_mlir=False)


def _facts(program: Program, circuit: Any, seconds: float) -> CircuitFacts:
    statistics = circuit.statistics
    keys = circuit.size_of_bootstrap_keys + circuit.size_of_keyswitch_keys
    bits = [Lookup.of(n).bits for n in program.calls(LOOKUP)]
    parameters = tuple(
        str(p) for p in statistics.get("programmable_bootstrap_count_per_parameter", {})
    )
    return CircuitFacts(
        look_ups=int(statistics.get("programmable_bootstrap_count", 0)),
        complexity=float(circuit.complexity),
        max_lookup_bits=max(bits, default=0),
        p_error=float(circuit.p_error),
        key_bytes=int(keys),
        input_bytes=int(circuit.size_of_inputs),
        output_bytes=int(circuit.size_of_outputs),
        compile_seconds=seconds,
        parameters=parameters,
    )

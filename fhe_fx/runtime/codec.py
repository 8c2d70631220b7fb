"""What a client needs to speak to a circuit: the encodings of its inputs and results.

They are scales, offsets and bounds; no weight of the encrypted part is among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, fx

from fhe_fx.backends.base import Integers
from fhe_fx.errors import ArtifactError, InputError
from fhe_fx.ir import dialect as d
from fhe_fx.ir.program import Program
from fhe_fx.ir.types import ValueType, as_decrypted

__all__ = ["CODEC_ENTRIES", "Codec", "Port"]

CODEC_ENTRIES = ("codec.json", "codec.safetensors")
"""Entries of client.zip that hold a codec."""


@dataclass(frozen=True)
class Port:
    """One encrypted input or one result of a circuit."""

    name: str
    """Name of its node."""
    source: int
    """Number of the real input that it encodes; for a result, its own number."""
    shape: tuple[int, ...]
    """Shape of its integers."""
    type: ValueType
    """What the integers mean."""

    def summary(self) -> dict[str, Any]:
        """Describe it in a few numbers, per-channel arrays by their least and greatest value."""
        t = self.type
        return {
            "name": self.name,
            "source": self.source,
            "shape": list(self.shape),
            "bits": t.bits,
            "low": t.low,
            "high": t.high,
            "scale": [float(t.scale.min()), float(t.scale.max())],
            "offset": [float(t.offset.min()), float(t.offset.max())],
        }


@dataclass(frozen=True)
class Codec:
    """Real tensors to a circuit's integers, and back."""

    inputs: tuple[Port, ...]
    """What is encrypted; several may encode the same real input."""
    results: tuple[Port, ...]
    """What is decrypted."""

    @staticmethod
    def of(program: Program) -> Codec:
        """Read the encodings of an integer program.

        The offset of a result is rounded to whole units of it: it holds what the region adds to
        it, such as a bias, and the client is to know no more of that than one result tells.
        """

        def port(node: fx.Node, source: int) -> Port:
            return Port(node.name, source, d.shape_of(node), node.meta["type"])

        return Codec(
            tuple(port(n, program.source_of(n)) for n in program.placeholders),
            tuple(_in_units(port(n, k)) for k, n in enumerate(program.results)),
        )

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shape of each real input."""
        by_source = {port.source: port.shape for port in self.inputs}
        return [by_source.get(k, ()) for k in range(max(by_source, default=-1) + 1)]

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Check that real inputs fit.

        Raises:
            InputError: names the input, its shape and the one expected.
        """
        if len(inputs) != len(self.shapes()):
            raise InputError(
                f"{len(inputs)} inputs were given; the circuit takes {len(self.shapes())}."
            )
        for number, (x, shape) in enumerate(zip(inputs, self.shapes(), strict=True)):
            if tuple(x.shape) != shape:
                raise InputError(
                    f"Input {number} has shape {list(x.shape)}; the circuit takes {list(shape)}."
                )
            if not bool(torch.isfinite(x).all()):
                raise InputError(f"Input {number} holds nan or inf.")

    def encode(self, inputs: Sequence[Tensor]) -> list[Integers]:
        """Quantize real inputs; values beyond the calibrated range are clipped.

        Raises:
            InputError: if they do not fit.
        """
        self.check(inputs)
        encoded = []
        for port in self.inputs:
            real, t = inputs[port.source].detach().double(), port.type
            whole = ((real - t.offset) / t.scale).round()
            # Row by row: Concrete reads clear inputs as they stand in memory, whatever the strides.
            encoded.append(whole.clamp(t.low, t.high).long().contiguous().numpy())
        return encoded

    def decode(self, results: Sequence[Integers]) -> list[Tensor]:
        """Turn decrypted integers into real tensors, float32."""
        return [
            (whole * p.type.scale + p.type.offset).float()
            for p, whole in zip(self.results, self._whole(results), strict=True)
        ]

    def _whole(self, results: Sequence[Integers]) -> list[Tensor]:
        """Read decrypted results modulo what a ciphertext holds of each."""
        return [
            as_decrypted(torch.from_numpy(q).reshape(p.shape), p.type.bits)
            for p, q in zip(self.results, results, strict=True)
        ]

    def to_entries(self) -> dict[str, bytes]:
        """Write as JSON and safetensors."""
        ports = {f"{k}.{i}": p for k, ps in self._groups().items() for i, p in enumerate(ps)}
        tensors = {f"{key}.scale": p.type.scale.contiguous().clone() for key, p in ports.items()}
        tensors |= {f"{key}.offset": p.type.offset.contiguous().clone() for key, p in ports.items()}
        described = {k: [p.summary() for p in ps] for k, ps in self._groups().items()}
        text = json.dumps(described, indent=1)
        return dict(zip(CODEC_ENTRIES, (text.encode(), safetensors.save(tensors)), strict=True))

    def _groups(self) -> dict[str, tuple[Port, ...]]:
        return {"inputs": self.inputs, "results": self.results}

    @staticmethod
    def from_entries(entries: Mapping[str, bytes]) -> Codec:
        """Read what `to_entries` wrote.

        Raises:
            ArtifactError: if it is malformed.
        """
        try:
            described = json.loads(entries[CODEC_ENTRIES[0]])
            tensors = safetensors.load(entries[CODEC_ENTRIES[1]])
            return Codec(*(_ports(k, described[k], tensors) for k in ("inputs", "results")))
        except Exception as error:  # whatever the bytes hold, the answer is one sentence
            raise ArtifactError(
                f"client.zip holds a codec that cannot be read ({type(error).__name__}: {error}). "
                f"Export the region again."
            ) from error


def _in_units(port: Port) -> Port:
    t = port.type
    offset = (t.offset / t.scale).round() * t.scale
    return replace(port, type=ValueType(t.scale, offset, t.low, t.high))


def _ports(
    group: str, described: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> tuple[Port, ...]:
    ports = []
    for number, port in enumerate(described):
        shape = tuple(int(n) for n in port["shape"])
        scale, offset = (tensors[f"{group}.{number}.{part}"] for part in ("scale", "offset"))
        torch.broadcast_to(scale + offset, shape)
        value_type = ValueType(scale, offset, int(port["low"]), int(port["high"]))
        ports.append(Port(str(port["name"]), int(port["source"]), shape, value_type))
    return tuple(ports)

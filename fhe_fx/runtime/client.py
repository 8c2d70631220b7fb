"""What stands in a client's model for a part whose weights are with the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from torch import Tensor, fx, nn

from fhe_fx.errors import ArtifactError, InputError, OptionsError
from fhe_fx.ir.program import Program
from fhe_fx.runtime.causality import digest_of_clear
from fhe_fx.runtime.codec import Codec
from fhe_fx.runtime.fitting import Fitted
from fhe_fx.runtime.module import EncryptedModule
from fhe_fx.runtime.region import MODES, Region, Remote, run_composed
from fhe_fx.runtime.signature import Signature, keyed_leaves

__all__ = ["ClientModule", "ClientRegion"]


@dataclass
class ClientRegion:
    """The client's side of a `Region`: prefix, encodings and suffix, and no weight in between."""

    name: str
    """Dotted path of the submodule."""
    circuit_name: str
    """The same, and the heads if some were chosen."""
    composed: fx.GraphModule
    """Prefix and suffix; the encrypted region between them cannot be called."""
    codec: Codec
    """Encodings of the circuit's inputs and results."""
    input_shapes: tuple[tuple[int, ...], ...]
    """Shape of each encrypted input of the submodule, for one sample."""
    causal_axes: Mapping[tuple[int, ...], Mapping[int, int] | None]
    """What was proved on the graph when it was written: see `Region.causal`."""
    causal_under_clear: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """The same under clear inputs, by their digest: see `Region.causal_under`."""
    tokens: int | None = None
    """As in `Region`."""
    remote: Remote | None = None
    """Who runs it."""

    def __deepcopy__(self, memo: dict[int, object]) -> ClientRegion:
        """Share it: nothing in it changes, and a connection cannot be copied."""
        return self

    @property
    def program(self) -> Program:
        """Nothing: the circuit is with the server.

        Raises:
            ArtifactError: always.
        """
        raise self._absent()

    @property
    def facts(self) -> None:
        """Nothing: what the circuit costs is not said to clients in data."""
        return

    def circuit(self) -> NoReturn:
        """Refuse, as `program` does."""
        raise self._absent()

    def _absent(self) -> ArtifactError:
        return ArtifactError(
            f"{self.name}: the circuit and its weights are with the server. What it costs is in "
            f"README.md beside the model."
        )

    def causal(self, row_axes: Sequence[int]) -> dict[int, int] | None:
        """Return the row axis of each result if the region was proved causal in these rows."""
        axes = self.causal_axes.get(tuple(row_axes))
        return None if axes is None else dict(axes)

    def causal_under(
        self, row_axes: Sequence[int | None], clear: Mapping[int, Tensor], given: int
    ) -> dict[int, int] | None:
        """Return the same under clear inputs such as calibration gave."""
        axes = self.causal_under_clear.get(digest_of_clear(row_axes, clear, given))
        return None if axes is None else dict(axes)

    def run_many(self, samples: Sequence[Sequence[Tensor]], mode: str) -> list[tuple[Tensor, ...]]:
        """Run several samples: the float parts here, the circuit on the server."""
        assert mode == "remote", "the mode was not checked"
        return run_composed(
            self.composed, samples, lambda inputs: [self._run(sample) for sample in inputs]
        )

    def _run(self, sample: Sequence[Tensor]) -> list[Tensor]:
        assert self.remote is not None, "the mode was not checked"
        return self.codec.decode(self.remote.execute(self.codec.encode(sample)))


class ClientModule(EncryptedModule):
    """Stands where a submodule was, without its weights: mode `remote` runs it on a server."""

    def __init__(self, skeleton: nn.Module, region: ClientRegion, signature: Signature) -> None:
        """Take the place of a submodule.

        Args:
            skeleton: the submodule that stands there, with any weights; these are dropped, and its
                plain attributes kept for whoever asks for them.
            region: the client's side of the part.
            signature: how a call maps to it.
        """
        for held in (skeleton._parameters, skeleton._buffers, skeleton._modules):
            held.clear()
        skeleton.eval()
        super().__init__(skeleton, cast(Region, region), signature)

    @property
    def mode(self) -> str:
        """`remote`; or `disable`, in which calls are refused."""
        return self._mode

    @mode.setter
    def mode(self, value: str) -> None:
        if value in MODES and value not in {"disable", "remote"}:
            raise OptionsError(
                f"mode={value!r}: the weights of {self.region.name} are with the server, so only "
                f"mode='remote' can run it here."
            )
        EncryptedModule.mode.fset(self, value)  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        """Say what stands here when the model is printed."""
        return f"{super().extra_repr()}, weights with the server"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Have the submodule run.

        Raises:
            InputError: if no server is connected, or the call does not fit what was compiled.
        """
        if self._mode == "disable":
            raise InputError(
                f"{self.region.name}: the weights of this part are with the server, so it cannot "
                f"run in float. Connect to one: fhe_fx.connect(url, client=DIR, model=model), then "
                f"fhe_fx.set_mode(model, 'remote')."
            )
        return super().forward(*args, **kwargs)

    def _check_effect(
        self,
        changed: Sequence[str],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        fitted: Fitted,
    ) -> None:
        """Refuse arguments other than the recorded ones: there is no float submodule to ask."""
        given, known = keyed_leaves(args, kwargs), self.signature.others
        # A flag that is off is one that is not given.
        named = [n for n in changed if not (_is_off(known.get(n)) and _is_off(given.get(n)))]
        if named:
            raise InputError(
                f"{self.region.name}: {', '.join(named)} is not what the circuit was compiled "
                f"with; the circuit holds it as a constant, and without the weights nobody can "
                f"tell whether the result changes. If it is a padding mask, run each prompt alone "
                f"and unpadded; if it is a cache, pass use_cache=False."
            )


def _is_off(value: object) -> bool:
    return value is None or value is False

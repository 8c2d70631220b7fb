"""The module that stands in a model where a submodule was, and runs it in the chosen mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fhe_fx.errors import InputError, OptionsError, did_you_mean
from fhe_fx.runtime.constants import allowed_effect, changed_arguments, effects, in_float32
from fhe_fx.runtime.fitting import Fitted, Fitting
from fhe_fx.runtime.region import MODES, Region
from fhe_fx.runtime.signature import Signature, keyed_leaves
from fhe_fx.runtime.standin import StandIn

__all__ = ["EncryptedModule", "Signature", "keyed_leaves"]

RELOADED_BEYOND = 0.02
"""Relative change of a weight's norm that a cast to half precision cannot explain."""


class EncryptedModule(StandIn):
    """Runs a submodule in float (`disable`), integers (`clear`), noise (`simulate`) or ciphertext
    (`execute`, `remote`), inside the model's own forward.
    """  # noqa: D205

    region: Region
    signature: Signature

    def __init__(self, original: nn.Module, region: Region, signature: Signature) -> None:
        super().__init__(original)
        self.region = region
        self.signature = signature
        self._mode = "disable"
        self._norms = self._weight_norms()

    @property
    def parts(self) -> tuple[EncryptedModule, ...]:
        """Itself: it has one circuit."""
        return (self,)

    def part_for(self, args: Sequence[Any], kwargs: dict[str, Any]) -> EncryptedModule:
        """Return itself."""
        return self

    @property
    def mode(self) -> str:
        """One of `disable`, `clear`, `simulate`, `execute`, `remote`."""
        return self._mode

    @mode.setter
    def mode(self, value: str) -> None:
        if value not in MODES:
            raise OptionsError(
                f"mode={value!r} is not one of {', '.join(MODES)}."
                f"{did_you_mean(str(value), list(MODES))}"
            )
        if value == "remote" and self.region.remote is None:
            raise OptionsError(
                f"{self.region.name} has no server. Connect to one first: "
                f"fhe_fx.connect(url, client=DIR, token=..., model=model)."
            )
        self._mode = value

    def extra_repr(self) -> str:
        """Say what stands here when the model is printed."""
        rows = " and ".join(str(list(shape)) for shape in self.region.input_shapes)
        own = self.original.extra_repr()
        name = type(self.original).__name__
        return f"{name}{f'({own})' if own else ''}, encrypted at {rows}, mode={self.mode}"

    @property
    def fitting(self) -> Fitting:
        """How calls fit the circuit."""
        return Fitting(self.region, self.signature)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the submodule.

        Raises:
            InputError: if the call does not fit what was compiled; names the argument.
        """
        if self._mode == "disable":
            return self.original(*args, **kwargs)
        self._check_state()
        leaves = keyed_leaves(args, kwargs)
        inputs = self.fitting.inputs(leaves)
        fitted = self.fitting.fitted(inputs)
        if changed := changed_arguments(self.region.name, self.signature, leaves):
            self._check_effect(changed, args, kwargs, fitted)
        runs = [fitted.cut(r) for r in self.region.run_many(fitted.samples, self._mode)]
        results = [torch.cat([run[k] for run in runs]) for k in range(len(runs[0]))]
        like = next((x for x in inputs if x.is_floating_point()), None)  # else only token numbers
        results = [r.to(inputs[0].device if like is None else like) for r in results]
        is_as_recorded = len(fitted.samples) == 1 and fitted.rows is None
        return self.signature.structured(results, is_as_recorded=is_as_recorded)

    def takes(self, leaves: dict[str, Any]) -> bool:
        """Say whether the inputs of a call are of the circuit's lengths, or may be padded to them.

        Args:
            leaves: what `keyed_leaves` made of the call.
        """
        try:
            self.fitting.fitted(self.fitting.inputs(leaves))
        except InputError:
            return False
        return True

    def samples_of(self, *args: Any, **kwargs: Any) -> list[list[Tensor]]:
        """Return what the region receives in a call: one list of inputs for each sample.

        Raises:
            InputError: if the call does not fit what was compiled.
        """
        return self.fitting.fitted(self.fitting.inputs(keyed_leaves(args, kwargs))).samples

    def _check_state(self) -> None:
        """Refuse a state in which the circuit is not what the module computes."""
        if self.training:
            raise InputError(
                f"{self.region.name} is in training mode; a circuit is one fixed function. "
                f"Call model.eval()."
            )
        for name, norm in self._weight_norms().items():
            known = self._norms.get(name, norm)
            if not abs(norm - known) <= RELOADED_BEYOND * known:
                raise InputError(
                    f"{self.region.name}.{name} has changed since the circuit was made: its norm "
                    f"is {norm:.4g} and was {known:.4g}. Encrypt the float model again."
                )

    def _weight_norms(self) -> dict[str, float]:
        with torch.no_grad():
            return {name: float(p.float().norm()) for name, p in self.named_parameters()}

    def _check_effect(
        self, changed: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any], fitted: Fitted
    ) -> None:
        """Refuse arguments that change the result; the float submodule tells."""
        expected, allowed = in_float32(self.original, args, kwargs), allowed_effect(self)
        for error in effects(expected, self.region, self.signature, fitted):
            if not error <= allowed:
                raise InputError(
                    f"{self.region.name}: {', '.join(changed)} is not what the circuit was "
                    f"compiled with, and changes the result by {error:.2g} of its range; the "
                    f"circuit holds it as a constant. If it is a padding mask, run each prompt "
                    f"alone and unpadded; if it is a cache, pass use_cache=False."
                )

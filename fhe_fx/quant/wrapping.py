"""The error of a look-up whose input may wrap."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fhe_fx.quant.noise import noise_in_slots
from fhe_fx.quant.tables import ROOM

__all__ = ["LookupError"]


class LookupError:
    """Errors of the answers of one look-up, times what an error does to the results.

    What is wrong with a value when it arrives is the fault of look-ups before, and not counted.

    Args:
        function: what the table holds.
        exact: values of the input on some samples, `[n_samples, *shape]`.
        rounded: the same as they arrive (`rounded_values`), likewise.
        index: scale class of every element, of shape `shape`.
        bits: input bits of the look-up.
        p_error: probability that noise leads to another entry.
        gradients: of the results by the answers, `[draws, n_samples, *shape]` (`sensitivities`).
        n_calibrated: the first samples are those that the results of a table have room for.
        is_clipped: whether values are clipped at the ends before they are looked up, as a client
            does with its inputs.
    """

    def __init__(
        self,
        function: fx.GraphModule,
        exact: Tensor,
        rounded: Tensor,
        index: Tensor,
        bits: int,
        p_error: float,
        gradients: Tensor,
        n_calibrated: int,
        is_clipped: bool,
    ) -> None:
        exact, arriving = exact.flatten(1).double(), rounded.flatten(1).double()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(arriving.shape, generator=generator, dtype=torch.float64)
        self.function, self.shape, self.half = function, index.shape, 1 << (bits - 1)
        self.index = index.reshape(-1)
        self.arriving, self.noise = arriving, noise_in_slots(p_error) * noise
        self.is_clipped = is_clipped
        self.gradients = gradients.flatten(2)
        self.domain = self._ends(exact[:n_calibrated])
        least, greatest = self._ends(self._apply(exact[:n_calibrated]))
        room = ROOM * (greatest - least)
        self.codomain = (least - room, greatest + room)
        # Beyond the room for results no range helps.
        self.expected = self._tabulated(arriving)

    def of(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the weighted errors when every value is looked up in its `[low, high]`.

        Args:
            low: an end for each element, float64, of shape `shape`.
            high: likewise.

        Returns:
            Errors `[draws, n_samples, numel]`.
        """
        low_end, high_end = low.reshape(-1), high.reshape(-1)
        slot = ((high_end - low_end) / (2 * self.half)).clamp_min(1e-30)
        middle = (low_end + high_end) / 2
        arriving = self.arriving
        if self.is_clipped:
            arriving = torch.minimum(torch.maximum(arriving, low_end), high_end)
        entry = ((arriving - middle) / slot + self.noise).round()
        turns = torch.div(entry + self.half, 2 * self.half, rounding_mode="floor")
        wrapped = entry - turns * (2 * self.half)
        answer = self._tabulated(middle + wrapped * slot)
        twice = self._tabulated(torch.stack([low_end, high_end - slot])).sum(0)
        # Anti-periodic: a turn reads minus the entry, and the table is centred on its two ends.
        answer = torch.where(turns.remainder(2) == 1, twice - answer, answer)
        return self.gradients * (answer - self.expected)

    def _tabulated(self, x: Tensor) -> Tensor:
        """Answer as a table does, which has room for little more than the observed results."""
        return torch.minimum(torch.maximum(self._apply(x), self.codomain[0]), self.codomain[1])

    def _apply(self, x: Tensor) -> Tensor:
        """Apply the function; where it has no value, answer as at the end of the observed range."""

        def evaluate(v: Tensor) -> Tensor:
            with torch.no_grad():
                answer: Tensor = self.function(v.float().view(-1, *self.shape))
            return answer.double().flatten(1)

        found = evaluate(x)
        if not bool(found.isfinite().all()):
            inside = torch.minimum(torch.maximum(x, self.domain[0]), self.domain[1])
            found = torch.where(found.isfinite(), found, evaluate(inside))
        return found

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return least and greatest value in the class of each element."""
        ends = []
        for how, extremes in (("amin", values.amin(0)), ("amax", values.amax(0))):
            found = torch.zeros(int(self.index.max()) + 1, dtype=torch.float64)
            reduced = found.scatter_reduce(0, self.index, extremes, how, include_self=False)
            ends.append(reduced[self.index])
        return ends[0], ends[1]

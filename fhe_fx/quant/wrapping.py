"""The error of a look-up whose input may wrap."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fhe_fx.quant.noise import noise_in_slots
from fhe_fx.quant.tables import ROOM

__all__ = ["LookupError"]

_TOGETHER = 1 << 16
"""Values that are looked up at once, about: what is made of them stays in a processor's cache."""
_ZERO = 1e-4
"""Part of the mean derivative up to which one is zero, but for the rounding of its parts."""


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
        exact, arriving = exact.flatten(1).float(), rounded.flatten(1).float()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(arriving.shape, generator=generator, dtype=torch.float64)
        self.function, self.shape, self.size = function, index.shape, 1 << bits
        self.index = index.reshape(-1)
        self.arriving, self.noise = arriving, (noise_in_slots(p_error) * noise).float()
        self.is_clipped = is_clipped
        self.gradients = gradients.flatten(2).float()
        self.gradients_if_wrapped = self._nowhere_zero(self.gradients)
        self.has_zeros = not torch.equal(self.gradients, self.gradients_if_wrapped)
        self.domain = self._ends(exact[:n_calibrated])
        least, greatest = self._ends(self._apply(exact[:n_calibrated]))
        room = ROOM * (greatest - least)
        self.codomain = (least - room, greatest + room)
        # Beyond the room for results no range helps.
        self.expected = self._tabulated(arriving)

    def of(
        self, low: Tensor, high: Tensor, which: Tensor, meets_last: Tensor | None = None
    ) -> Tensor:
        """Return the weighted errors when every value is looked up in its `[low, high]`.

        Args:
            low: ends that an element may meet, `[n_ends, *shape]`.
            high: likewise.
            which: number of those that each sample meets, `[n_samples]`.
            meets_last: values that meet the last ones instead, bool, `[n_samples, numel]`.

        Returns:
            Errors `[draws, n_samples, numel]`, float32.
        """
        low_end, high_end = low.flatten(1).float(), high.flatten(1).float()
        slot = ((high_end - low_end) / self.size).clamp_min(1e-30)
        # Anti-periodic: a turn reads minus the entry, and the table is centred on its two ends.
        twice = self._tabulated(torch.cat([low_end, high_end - slot])).view(2, *slot.shape).sum(0)
        n_samples, numel = self.arriving.shape
        found = torch.empty(len(self.gradients), n_samples, numel)
        step = max(1, _TOGETHER // max(1, numel))
        for start in range(0, n_samples, step):
            some = slice(start, start + step)
            ends = [end[which[some]] for end in (low_end, high_end, slot, twice)]
            if meets_last is not None and bool(meets_last[some].any()):
                last = (end[-1] for end in (low_end, high_end, slot, twice))
                ends = [
                    torch.where(meets_last[some], b, a) for a, b in zip(ends, last, strict=True)
                ]
            answer, turns = self._answer(some, *ends)
            gradients = self.gradients[:, some]
            if self.has_zeros:
                gradients = torch.where(turns == 0, gradients, self.gradients_if_wrapped[:, some])
            torch.mul(gradients, answer.sub_(self.expected[some]), out=found[:, some])
        return found

    def _answer(
        self, some: slice, low_end: Tensor, high_end: Tensor, slot: Tensor, twice: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what some samples read, and how often each went past an end."""
        arriving = self.arriving[some]
        if self.is_clipped:
            arriving = arriving.clamp(low_end, high_end)
        entry = (arriving - low_end).div_(slot).add_(self.noise[some]).round_()
        turns = (entry / self.size).floor_()
        entry.sub_(turns, alpha=self.size)
        answer = self._tabulated(torch.addcmul(low_end, entry, slot))
        half_turns = turns / 2
        return torch.where(half_turns == half_turns.floor(), answer, twice - answer), turns

    def _tabulated(self, x: Tensor) -> Tensor:
        """Answer as a table does, which has room for little more than the observed results."""
        return self._apply(x).clamp(*self.codomain)

    def _apply(self, x: Tensor) -> Tensor:
        """Apply the function; where it has no value, answer as at the end of the observed range."""

        def evaluate(v: Tensor) -> Tensor:
            with torch.no_grad():
                answer: Tensor = self.function(v.view(-1, *self.shape))
            return answer.flatten(1)

        found = evaluate(x)
        if not math.isfinite(float(found.sum())):
            inside = x.clamp(*self.domain)
            found = torch.where(found.isfinite(), found, evaluate(inside))
        return found

    def _nowhere_zero(self, gradients: Tensor) -> Tensor:
        """Return gradients with the mean size in the class of each element in place of zeros.

        A derivative says what a small error does. The error of a value that wraps may be large, and
        the derivative zero only as long as it is small: that of the greater of two, under a least.
        """
        size = gradients.abs()
        zeros = torch.zeros(int(self.index.max()) + 1)
        total = zeros.scatter_add(0, self.index, size.mean((0, 1)))
        count = zeros.scatter_add(0, self.index, torch.ones_like(size[0, 0]))
        usual = (total / count)[self.index]
        return torch.where(size > _ZERO * usual, gradients, usual)

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return least and greatest value in the class of each element."""
        ends = []
        for how, extremes in (("amin", values.amin(0)), ("amax", values.amax(0))):
            found = torch.zeros(int(self.index.max()) + 1)
            reduced = found.scatter_reduce(0, self.index, extremes, how, include_self=False)
            ends.append(reduced[self.index])
        return ends[0], ends[1]

"""How often a value will lie outside its range on inputs to come, and how wrong the answer is then.

Found by running the integers on the calibration samples with the noise of look-ups. Each value is
held against the range as it would be without its own sample (`left_out`), and the noise with which
it is read counts by its probability, so that what is rarer than a sample in all is seen, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from fhe_fx.quant.left_out import Ends

__all__ = ["Errors", "Overflow", "Places", "Tally", "percent"]

Places = tuple[Tensor, Tensor]
"""Of some values: their samples among those at hand, and their numbers within a sample."""
Errors = Callable[[Places, Tensor, Tensor, Tensor], Tensor]

_CONFIDENCE = 1.645
"""Deviations of a normal value that it passes with a probability of 5 %."""
_NONE_SEEN = 3.0
"""Divided by the number of values, what the share outside is at most, with 95 % confidence, where
none was seen to be (the rule of three: Hanley and Lippman-Hand 1983)."""
_DEVIATIONS = 6.0
"""Noise is followed to that many deviations."""
_POINTS = 48
"""Values of the noise that are tried on each value near an end."""
_AT_ONCE = 1 << 14
"""Values near an end that are worked on together."""


@dataclass(frozen=True)
class Overflow:
    """What lies outside the range of one place: an input, a look-up, or a result."""

    probability: float
    """Expected share of the values that are clipped or wrap, noise included."""
    probability_at_most: float
    """With 95 % confidence: by the spread between samples, and the rule of three for what no sample
    showed."""
    values_outside: float
    """Expected share of the values that lie outside before the place's own noise; what
    `fhe_fx.inspect` counts."""
    n_values: int
    """From how many values it was estimated."""
    error: float | None = None
    """Root mean square error of what is clipped or wraps, in parts of the root mean square of what
    it should be; None where nothing does."""
    result_error: float | None = None
    """Error that it makes in the results, root mean square in parts of their deviation, as
    `max_error`; None where no derivatives are known."""

    @property
    def is_seen(self) -> bool:
        """Whether the probability is more than what so many values cannot tell from none."""
        return self.probability * self.n_values >= _NONE_SEEN

    def text(self) -> str:
        """Return the probability in words, "< 3 / n_values" where it is too small to be seen."""
        if self.is_seen:
            return percent(self.probability)
        return f"< {percent(min(1.0, _NONE_SEEN / max(1, self.n_values)))}"

    def to_json(self) -> str:
        """Write it as one line."""
        return json.dumps(asdict(self))


@dataclass
class Tally:
    """Adds up what is outside at one place, some samples after the other."""

    ends: Ends
    noise: float = 0.0
    """Deviation of the place's own noise, in the units of the ends."""
    weight: Tensor | None = None
    """Mean squared derivative of the results by each element, of its shape, if known."""
    outside: float = 0.0
    by_sample: list[Tensor] = field(default_factory=list)
    n_values: int = 0
    squares: float = 0.0
    """Of errors, each times its probability."""
    result_squares: float = 0.0

    def add(self, values: Tensor, samples: Tensor, errors: Errors) -> None:
        """Add some samples.

        Args:
            values: in the units of the ends, `[n, *shape]`, float64, before noise.
            samples: their numbers, `[n]`.
            errors: given the places of k values among `values`, what is read there with m values of
                the noise, `[k, m]`, and their ends, `[k, 1]` each: the error of each answer.
        """
        n, numel = len(values), math.prod(values.shape[1:])
        values = values.reshape(n, numel)
        low, high = (end.reshape(n, numel) for end in self.ends.without(samples))
        self.outside += float(((values < low) | (values >= high)).sum())
        self.n_values += n * numel
        reach = _DEVIATIONS * self.noise
        near = ((values < low + reach) | (values >= high - reach)).nonzero()
        shares = torch.zeros(n, dtype=torch.float64)
        for chosen in near.split(_AT_ONCE):
            at = chosen[:, 0], chosen[:, 1]
            ends = low[at].unsqueeze(1), high[at].unsqueeze(1)
            probability, squares = self._outside(at, values[at].unsqueeze(1), ends, errors)
            shares.index_add_(0, at[0], probability)
            self.squares += float(squares.sum())
            if self.weight is not None:
                self.result_squares += float((squares * self.weight.reshape(-1)[at[1]]).sum())
        self.by_sample.append(shares / max(1, numel))

    def _outside(
        self, at: Places, values: Tensor, ends: tuple[Tensor, Tensor], errors: Errors
    ) -> tuple[Tensor, Tensor]:
        """Return the probability that each value is outside, and of that its mean square error."""
        low, high = ends
        if not self.noise:
            is_outside = ((values < low) | (values >= high)).double().squeeze(1)
            return is_outside, is_outside * errors(at, values, low, high).square().squeeze(1)
        below = torch.special.ndtr((low - values) / self.noise)
        above = torch.special.ndtr((values - high) / self.noise)
        probability = (below + above).squeeze(1)
        z = torch.linspace(-_DEVIATIONS, _DEVIATIONS, _POINTS, dtype=torch.float64)
        read = values + self.noise * z
        chance = torch.exp(-z.square() / 2) * ((read < low) | (read >= high))
        squares = (chance * errors(at, read, low, high).square()).sum(1)
        return probability, probability * squares / chance.sum(1).clamp_min(1e-30)

    def overflow(self, size: float, n_results: int) -> Overflow:
        """Return what was found.

        Args:
            size: root mean square of what the answers should be.
            n_results: how many numbers the program returns.
        """
        shares = torch.cat(self.by_sample)
        probability, n = float(shares.mean()), max(1, self.n_values)
        spread = float(shares.std()) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
        expected = probability * n
        result_error = None
        if self.weight is not None:
            result_error = math.sqrt(self.result_squares / len(shares) / n_results)
        return Overflow(
            probability=probability,
            probability_at_most=min(1.0, probability + _CONFIDENCE * spread + _NONE_SEEN / n),
            values_outside=self.outside / n,
            n_values=self.n_values,
            error=math.sqrt(self.squares / expected) / max(size, 1e-30) if expected else None,
            result_error=result_error,
        )


def percent(share: float) -> str:
    """Write a share in two digits."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"

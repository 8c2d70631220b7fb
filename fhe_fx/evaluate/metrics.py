"""What is measured at every position, and how sure one may be of it.

Positions of a sentence are not independent, sentences are: so intervals come from resampling whole
sentences (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13: percentile
intervals; Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation").
Every metric is a function of two sums over sentences, which makes a resampling one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LEVEL", "METRICS", "Estimate", "Tally", "position_sums"]

LEVEL = 0.95
"""Coverage of the intervals."""
_RESAMPLES = 2000
_TOP = (1, 5, 10)

METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "top1": lambda mean: mean,
    "top5": lambda mean: mean,
    "top10": lambda mean: mean,
    "perplexity": torch.exp,
    "kl": lambda mean: mean,
    "relative_error": torch.sqrt,
}
"""Each metric, as a function of the mean that it is made of."""


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval; without an interval if there is one sentence."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass
class Tally:
    """Sums of each metric, one pair a sentence: what was found, and out of how much."""

    found: dict[str, list[Tensor]] = field(default_factory=dict)
    out_of: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, found: Tensor, out_of: Tensor) -> None:
        """Add some sentences, `[n]` each."""
        self.found.setdefault(name, []).append(found.double())
        self.out_of.setdefault(name, []).append(out_of.double())

    def estimates(self) -> dict[str, Estimate]:
        """Return every metric that was measured anywhere."""
        return {
            name: _estimate(torch.cat(self.found[name]), torch.cat(self.out_of[name]), transform)
            for name, transform in METRICS.items()
            if name in self.found and float(torch.cat(self.out_of[name]).sum()) > 0
        }


def _estimate(found: Tensor, out_of: Tensor, transform: Callable[[Tensor], Tensor]) -> Estimate:
    value = float(transform(found.sum() / out_of.sum()))
    n = len(found)
    if n < 2:
        return Estimate(value)
    drawn = torch.randint(n, (_RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    sums = out_of[drawn].sum(1)
    means = found[drawn].sum(1)[sums > 0] / sums[sums > 0]
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(transform(means), torch.tensor([tail, 1 - tail]).double())
    return Estimate(value, float(low), float(high))


def position_sums(tally: Tally, expected: Tensor, logits: Tensor, ids: Tensor) -> None:
    """Compare next-token predictions with the float model's, at every position.

    Top-k agreement: how often the float model's most likely token is among the k most likely ones.
    Perplexity is that of the text, where the next token is known. KL is of the prediction from the
    float model's, in nats.

    Args:
        tally: what is added to.
        expected: logits of the float model, `[n, tokens, vocabulary]`.
        logits: those to be judged.
        ids: the text, `[n, tokens]`.
    """
    n, tokens = ids.shape
    positions = torch.full((n,), tokens)
    best = expected.argmax(-1, keepdim=True)
    # Ties go to the lower token number, as argmax decides them: equal logits always agree.
    likely = logits.gather(-1, best)
    places = torch.arange(logits.shape[-1])
    ahead = ((logits > likely) | ((logits == likely) & (places < best))).sum(-1)
    for k in _TOP:
        tally.add(f"top{k}", (ahead < k).sum(-1), positions)
    ours, theirs = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0)
    tally.add("kl", kl.sum(-1), positions)
    targets = ids[:, 1:].unsqueeze(-1)
    tally.add("perplexity", -ours[:, :-1].gather(-1, targets).sum((1, 2)), positions - 1)

"""Text from a language model whose parts are encrypted, one token after the other.

A circuit has no past: each token costs a run over all tokens before it. So a plan says beforehand
which lengths of circuit will run how often, and whether the text outgrows the longest. A text that
does is refused, or read through a window that slides: the model then sees the last tokens only, at
the positions of the first.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fhe_fx.errors import InputError, OptionsError, did_you_mean
from fhe_fx.runtime.standin import StandIn, stand_ins

__all__ = [
    "OUTGROWN",
    "Plan",
    "Sampling",
    "Token",
    "generate",
    "lengths_for",
    "plan_generation",
    "rows_read",
]

OUTGROWN = ("error", "slide")
"""What is done with a text longer than the longest circuit."""
SHORTEST, LONGEST = 4, 16
"""Ends of the ladder that `lengths_for` builds."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen among those that a model finds likely.

    Raises:
        OptionsError: if a value is outside its domain, or would have no effect.
    """

    temperature: float = 0.0
    """Divides the logits; at zero the most likely token is taken."""
    top_k: int = 0
    """How many of the most likely tokens are drawn from; zero draws from all."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        is_number = isinstance(self.temperature, (int, float))
        if not is_number or not 0 <= self.temperature < math.inf:
            raise OptionsError(
                f"temperature={self.temperature!r} is not a number from 0 on. Try 0.8, or 0 for "
                f"the most likely token."
            )
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise OptionsError(f"top_k={self.top_k!r} is not a number of tokens. Try top_k=50.")
        if self.top_k and not self.temperature:
            raise OptionsError(
                f"top_k={self.top_k} has no effect at temperature 0, where the most likely token "
                f"is taken. Give a temperature such as 0.8."
            )
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise OptionsError(f"seed={self.seed!r} is not an integer in [0, 2**63).")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what tokens are drawn with, `[vocabulary]`.

        Args:
            logits: of the next token, `[vocabulary]`.
        """
        if not self.temperature:
            return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1)
        if self.top_k:
            least = logits.topk(min(self.top_k, len(logits))).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return (logits / self.temperature).softmax(-1)


@dataclass(frozen=True)
class Token:
    """One token that was written."""

    id: int
    """Its number in the vocabulary."""
    rows: int
    """Tokens that the model read for it."""
    circuit: int | None
    """Length of the circuit that ran; None in mode "disable"."""
    seconds: float
    """How long it took."""


@dataclass(frozen=True)
class Plan:
    """What a generation will run, in the order of its tokens."""

    rows: tuple[int, ...]
    """Tokens that the model reads for each new one."""
    circuits: tuple[int | None, ...]
    """Length of the circuit that each takes; None where nothing is encrypted."""
    slides_from: int | None
    """Number of the first new token for which the window has moved, from 0; None if it never does.
    """
    complexity: float | None
    """Of all runs together; None unless every circuit that runs is compiled."""

    def __str__(self) -> str:
        runs = sorted(Counter(n for n in self.circuits if n is not None).items())
        text = _counted(len(self.rows), "new token")
        if runs:
            listed = [f"{_counted(k, 'run')} of {_counted(n, 'token')}" for n, k in runs]
            text += f": {', '.join(listed)}"
        if self.slides_from is not None:
            window = f"the model reads the last {max(self.rows)} only"
            text += f"; from new token {self.slides_from + 1} on {window}"
        return text


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def rows_read(
    n_prompt: int, n_new: int, longest: int | None, outgrown: str = "error"
) -> tuple[int, ...]:
    """Return how many tokens are read for each new one.

    Args:
        n_prompt: tokens of the prompt.
        n_new: tokens to write.
        longest: what the longest circuit takes; None if there is no limit.
        outgrown: "error" or "slide".

    Raises:
        OptionsError: if a number is not positive, or `outgrown` is neither.
        InputError: if the text outgrows the longest circuit, and may not.
    """
    if outgrown not in OUTGROWN:
        raise OptionsError(
            f"outgrown={outgrown!r} is not one of {', '.join(OUTGROWN)}."
            f"{did_you_mean(str(outgrown), list(OUTGROWN))}"
        )
    if not isinstance(n_new, int) or isinstance(n_new, bool) or n_new < 1:
        raise OptionsError(f"max_new_tokens={n_new!r} is not a positive integer.")
    if n_prompt < 1:
        raise InputError("The prompt has no token. Give at least one word.")
    rows = range(n_prompt, n_prompt + n_new)
    if longest is None or rows[-1] <= longest:
        return tuple(rows)
    if outgrown == "slide":
        return tuple(min(n, longest) for n in rows)
    fits = longest - n_prompt + 1
    fewer = f"Ask for {fits} new ones at most" if fits > 0 else "Shorten it"
    raise InputError(
        f"A prompt of {n_prompt} tokens and {n_new} new ones make a model read {rows[-1]} tokens; "
        f"the longest circuit takes {longest}. {fewer}, add {rows[-1]} to the lengths (max_tokens, "
        f"--tokens), or let a window of {longest} tokens slide (outgrown, --outgrown slide)."
    )


def lengths_for(n_prompt: int, n_new: int) -> tuple[int, ...]:
    """Return lengths of circuits for a prompt and new tokens: doubled from 4 on, up to 16.

    The longest is no longer than needed. A text beyond 16 tokens needs lengths of one's own.
    """
    needed = max(1, min(n_prompt + n_new - 1, LONGEST))
    doubled = [SHORTEST << k for k in range((LONGEST // SHORTEST).bit_length())]
    return (*(n for n in doubled if min(n_prompt, needed) <= n < needed), needed)


def plan_generation(model: nn.Module, n_prompt: int, n_new: int, outgrown: str = "error") -> Plan:
    """Say what a generation will run, without running it.

    Args:
        model: returned by `encrypt_submodule`, in the mode that it will run in.
        n_prompt: tokens of the prompt.
        n_new: tokens to write.
        outgrown: "error" or "slide".

    Raises:
        InputError: if the text outgrows the longest circuit, and may not.
    """
    active = [s for s in stand_ins(model) if s.mode != "disable"]
    ladders = [found for s in active if (found := _lengths(s))]
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    limits = [ladder[-1] for ladder in ladders] + ([room] if isinstance(room, int) else [])
    rows = rows_read(n_prompt, n_new, min(limits, default=None), outgrown)
    taken = [max((_taken(ladder, n) for ladder in ladders), default=None) for n in rows]
    slides = [k for k, n in enumerate(rows) if n_prompt + k > n]
    complexity = _complexity(active, rows)
    return Plan(rows, tuple(taken), slides[0] if slides else None, complexity)


def generate(
    model: nn.Module,
    prompt: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    outgrown: str = "error",
    stop: Collection[int] | None = None,
) -> Iterator[Token]:
    """Let a language model write, and yield each token as it comes.

    Everything is checked at the call, before the first token is asked for.

    Args:
        model: takes `input_ids` and returns `logits`; in the mode in which it is to run.
        prompt: token numbers, `[n]` or `[1, n]`.
        max_new_tokens: how many to write at most.
        temperature: divides the logits; at zero the most likely token is taken.
        top_k: how many of the most likely tokens are drawn from; zero draws from all.
        seed: of the draws.
        outgrown: what to do when the text is longer than the longest circuit: "error", at once, or
            "slide": the model reads the last tokens only, at the positions of the first.
        stop: tokens that end the text; by default the model's own end.

    Raises:
        OptionsError: if an option is outside its domain.
        InputError: if the prompt is not one text, or outgrows the longest circuit and may not, or
            if the model is not a language model.
    """
    sampling = Sampling(temperature, top_k, seed)
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{type(model).__name__} takes no input_ids, so it cannot write.")
    ids = _one_text(prompt)
    plan = plan_generation(model, len(ids), max_new_tokens, outgrown)
    ends = frozenset(_ends(model) if stop is None else stop)
    return _tokens(model, ids, plan, sampling, ends)


def _tokens(
    model: nn.Module, ids: Tensor, plan: Plan, sampling: Sampling, ends: frozenset[int]
) -> Iterator[Token]:
    generator = torch.Generator().manual_seed(sampling.seed)
    for rows, circuit in zip(plan.rows, plan.circuits, strict=True):
        start = time.perf_counter()
        logits = _next_logits(model, ids[None, -rows:])
        new = torch.multinomial(sampling.probabilities(logits), 1, generator=generator)
        ids = torch.cat([ids, new])
        yield Token(int(new), rows, circuit, time.perf_counter() - start)
        if int(new) in ends:
            return


def _next_logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=ids)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise InputError(
            f"{type(model).__name__} returns no logits of next tokens, [1, n, vocabulary], so it "
            f"cannot write. Load the model with its language head."
        )
    last = logits[0, -1].detach().float().cpu()
    if not bool(torch.isfinite(last).all()):
        raise InputError(f"{type(model).__name__} returns nan or inf on {ids.shape[1]} tokens.")
    return last


def _one_text(prompt: Tensor | Sequence[int]) -> Tensor:
    ids = torch.as_tensor(prompt)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise InputError(
            f"The prompt has shape {list(ids.shape)} and type {ids.dtype}; give the token numbers "
            f"of one text, [n] or [1, n]."
        )
    return ids.long().cpu()


def _ends(model: nn.Module) -> list[int]:
    config: Any = getattr(model, "generation_config", None) or getattr(model, "config", None)
    found = getattr(config, "eos_token_id", None)
    return list(found) if isinstance(found, (list, tuple)) else [] if found is None else [found]


def _lengths(stand_in: StandIn) -> list[int]:
    return [p.region.tokens for p in stand_in.parts if p.region.tokens is not None]


def _taken(lengths: Sequence[int], rows: int) -> int:
    return next((n for n in lengths if n >= rows), lengths[-1])


def _complexity(active: Sequence[StandIn], rows: Sequence[int]) -> float | None:
    total = 0.0
    for stand_in in active:
        facts = {part.region.tokens: part.region.facts for part in stand_in.parts}
        lengths = _lengths(stand_in)
        for n in rows:
            of_run = facts[_taken(lengths, n) if lengths else None]
            if of_run is None:
                return None
            total += of_run.complexity
    return total

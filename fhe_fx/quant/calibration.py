"""Calibration inputs: those given are checked, those missing are sampled from the model itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fhe_fx.errors import CalibrationError
from fhe_fx.options import Options
from fhe_fx.quant.next_token import NextToken

__all__ = ["Call", "as_call", "check_calibration", "sample_from_model"]


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, in order."""
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]


def as_call(given: Any) -> Call:
    """Read a tensor, a tuple of arguments, or a mapping of keyword arguments as a call.

    Raises:
        CalibrationError: if it is none of these.
    """
    if isinstance(given, Call):
        return given
    if isinstance(given, Tensor):
        return Call((given,), {})
    if isinstance(given, Mapping):
        return Call((), dict(given))
    if isinstance(given, (tuple, list)) and all(isinstance(v, Tensor) for v in given):
        return Call(tuple(given), {})
    raise CalibrationError(
        f"A model input is a {type(given).__name__}; give a tensor, a tuple of tensors, or a "
        f"mapping of keyword arguments (as a tokenizer returns)."
    )


def check_calibration(given: Iterable[Any]) -> list[Call]:
    """Read and check calibration inputs.

    Raises:
        CalibrationError: if there is none, or one is not finite.

    Warns:
        UserWarning: if they look like random noise, on which ranges mean nothing.
    """
    if isinstance(given, (Tensor, Mapping)):
        given = [given]  # one batch
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise CalibrationError(
            f"calibration is a {type(given).__name__}; give a list of model inputs."
        )
    calls = [as_call(one) for one in given]
    if not calls:
        raise CalibrationError("calibration is empty. Give some inputs, or leave it out.")
    for number, call in enumerate(calls):
        if not all(bool(torch.isfinite(t).all()) for t in call.tensors() if t.is_floating_point()):
            raise CalibrationError(f"Calibration input {number} holds nan or inf.")
    reason = _looks_random(calls)
    if reason:
        warnings.warn(
            f"The calibration data look like random noise ({reason}). Ranges found on noise do not "
            f"fit real inputs. Give real inputs, or leave calibration out: the model then samples "
            f"its own.",
            UserWarning,
            stacklevel=4,  # the caller of encrypt_submodule
        )
    return calls


def _looks_random(calls: Sequence[Call]) -> str:
    first = [call.tensors()[0] for call in calls if call.tensors()]
    if not first:
        return ""
    flat = torch.cat([t.reshape(-1) for t in first])
    n = len(flat)
    if n < 32:
        return ""
    if flat.is_floating_point():
        # Independent normal or uniform values, all alike: real activations and pixels are not.
        values = flat.double()
        mean, deviation = float(values.mean()), float(values.std())
        kurtosis = float(((values - mean) ** 4).mean() / max(deviation, 1e-30) ** 4)
        error = 4.0 * math.sqrt(24.0 / n)
        if n < 256 or deviation == 0:
            return ""
        is_standard = abs(mean) < 4 / math.sqrt(n) and abs(deviation - 1) < 4 / math.sqrt(2 * n)
        if is_standard and abs(kurtosis - 3) < error:
            return "standard normal values"
        if abs(kurtosis - 1.8) < error / 2 and 0 <= float(values.min()) < float(values.max()) <= 1:
            return "values uniform on [0, 1]"
        return ""
    # Words repeat; uniform numbers hardly do. Compare collisions with what uniform ids would give.
    _, counts = torch.unique(flat, return_counts=True)
    collisions = float((counts.double() * (counts - 1)).sum()) / 2
    span = int(flat.max()) - int(flat.min()) + 1
    expected = n * (n - 1) / 2 / span
    if span > 64 and collisions < 2 * expected + 3 * math.sqrt(expected) + 1 and n >= 64:
        return "token numbers without repetition"
    return ""


def sample_from_model(model: nn.Module, tokens: int, options: Options) -> list[Call]:
    """Let a language model write its own calibration inputs, by sampling at temperature one.

    Args:
        model: takes `input_ids` and returns `logits`, or a base model of a vocabulary; the start of
            each sample is a token drawn from the model's own distribution after its first token.
        tokens: length of each sample.
        options: number of samples, and seed.

    Raises:
        CalibrationError: if the model has no vocabulary to sample from.
    """
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        raise CalibrationError(
            f"{type(model).__name__} has no vocabulary to sample inputs from. "
            f"Pass calibration=[...]: some dozens of real inputs."
        )
    # Long samples, cut in two, so that the first row of a circuit does not only see first words.
    room = getattr(model.config, "max_position_embeddings", None) or 2 * tokens + 1
    length = min(2 * tokens, max(tokens, room - 1))
    # The start token is dropped: prompts rarely begin with it, and it is an outlier in most models.
    cuts = sorted({1, 1 + length - tokens})  # one where there is only room for one
    generator = torch.Generator().manual_seed(options.seed)
    start = getattr(model.config, "bos_token_id", None)
    n = -(-options.n_samples // len(cuts))
    if isinstance(start, int) and start < size:
        ids = torch.full((n, 1), start)
    else:
        ids = torch.randint(size, (n, 1), generator=generator)
    reader = NextToken(model)
    with torch.no_grad():
        while ids.shape[1] <= length:
            try:
                logits = reader.logits(ids)
            except Exception as error:
                raise CalibrationError(
                    f"{type(model).__name__} cannot sample its own calibration inputs: it fails on "
                    f"{ids.shape[1]} tokens ({type(error).__name__}: {error}). "
                    f"Pass calibration=[...], or a smaller max_tokens."
                ) from error
            if logits is None:
                new = torch.randint(size, (n, 1), generator=generator)
            elif not bool(torch.isfinite(logits).all()):
                raise CalibrationError(
                    f"{type(model).__name__} returns nan or inf on {ids.shape[1]} tokens of its "
                    f"own. Load its weights again."
                )
            else:
                new = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, new], 1)
    rows = [row for cut in cuts for row in ids[:, cut : cut + tokens]]
    return [Call((), {"input_ids": row[None]}) for row in rows[: options.n_samples]]

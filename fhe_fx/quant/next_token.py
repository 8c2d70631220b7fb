"""What a language model expects after texts that grow token by token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NextToken"]

_CLOSE = 1e-3
"""How far logits may lie apart: probabilities then differ by two thousandths of themselves."""

_CHECKED = 8
"""Texts on which it is checked that what a model keeps does not change its answer."""

_NAMES = ("past_key_values", "cache")
"""What releases of transformers call the keys and values of the tokens before."""


class NextToken:
    """Reads texts with a model, every token once where the model can keep what it has read.

    Models of transformers' kind take and return keys and values of the tokens before. That the
    answer is then the same is checked once, on the second token of some of the texts; where it is
    not, or where a model keeps nothing, whole texts are read again.

    Args:
        model: takes `input_ids`, and returns `logits` or `last_hidden_state`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        takes = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._name = next((name for name in _NAMES if name in takes and "use_cache" in takes), "")
        self._may_keep = bool(self._name)
        self._kept: Any = None
        self._is_checked = False

    def logits(self, ids: Tensor) -> Tensor | None:
        """Return the logits of the token after each row, `[n, vocabulary]`; None without any.

        Args:
            ids: what was given the last time, if anything was, and one more token a row.
        """
        if not self._may_keep:
            return self._read(ids)
        if self._kept is None:
            return self._read(ids, use_cache=True)
        try:
            found = self._read(ids[:, -1:], use_cache=True, **{self._name: self._kept})
        except Exception:  # whatever it was, reading all of the text shows whether it matters
            found = None
        if found is not None and (self._is_checked or self._is_right(found, ids)):
            self._is_checked = True
            return found
        self._may_keep = False
        return self._read(ids)

    def _is_right(self, found: Tensor, ids: Tensor) -> bool:
        whole = self._read(ids[:_CHECKED])
        return whole is not None and torch.allclose(found[:_CHECKED], whole, rtol=0.0, atol=_CLOSE)

    def _read(self, ids: Tensor, **options: Any) -> Tensor | None:
        output = self.model(input_ids=ids, **options, **self._options)
        if options:
            kept = [getattr(output, name, None) for name in _NAMES]
            self._kept = next((k for k in kept if k is not None), None)
            self._may_keep = self._kept is not None
        logits = getattr(output, "logits", None)
        if logits is not None:
            return logits[:, -1]  # type: ignore[no-any-return]
        hidden = getattr(output, "last_hidden_state", None)
        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        if hidden is None or embedding is None or embedding.weight.shape[-1] != hidden.shape[-1]:
            return None
        return hidden[:, -1] @ embedding.weight.T  # type: ignore[no-any-return]

"""Models for the tests: the shipped GPT-2, and tiny random ones that transformers builds."""
# transformers and parts of torch are not typed:
# mypy: disable-error-code="no-untyped-call, call-arg, arg-type"

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fhe_fx import Options

SHIPPED = Path(__file__).parent.parent / "examples" / "gpt2" / "model"
FEW = Options(n_samples=8)
"""Calibration on eight samples: enough for a test of anything but accuracy."""

# The arrays are tiny: a second thread waits longer than it works.
torch.set_num_threads(1)


@functools.cache
def shipped_gpt2(blocks: int | None = None) -> Any:
    """Return the GPT-2 of examples/gpt2, or its first blocks; not to be changed by a test.

    Capture takes the whole model: where only the first block's input and output matter, the
    others cost time.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it lists the blocks that are left out
    changes = {} if blocks is None else {"n_layer": blocks}
    return AutoModelForCausalLM.from_pretrained(SHIPPED, **changes).eval()


@functools.cache
def shipped_sentences() -> list[Tensor]:
    """Return token numbers of held-out text, one sentence each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    lines = (SHIPPED / "heldout.txt").read_text().splitlines()
    return [tokenizer(line, return_tensors="pt")["input_ids"] for line in lines if line.strip()]


def tiny_gpt2(*, is_base: bool = False, attention: str = "sdpa", **changes: Any) -> Any:
    """Return a random GPT-2 of two blocks, 16 channels, 2 heads, 40 words."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 40}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, **changes}
    config = GPT2Config(**sizes, attn_implementation=attention, initializer_range=0.3)
    return (GPT2Model if is_base else GPT2LMHeadModel)(config).eval()


def tiny_llama(attention: str = "sdpa") -> Any:
    """Return a random Llama with rotary embeddings, 4 heads on 2 keys, RMSNorm and SwiGLU."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        max_position_embeddings=16,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return LlamaModel(config).eval()


def tiny_bert(attention: str = "sdpa") -> Any:
    """Return a random BERT: attention in both directions."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=16,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return BertModel(config).eval()


class Mlp(nn.Module):
    """A classifier with a nested part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.inner(x))  # type: ignore[no-any-return]


def mlp_inputs(n: int = 16) -> list[Tensor]:
    """Return real-looking inputs of `Mlp`: not standard normal, so that no warning is due."""
    generator = torch.Generator().manual_seed(1)
    return [0.5 * torch.randn(1, 6, generator=generator) + 0.1 for _ in range(n)]


def token_inputs(n: int = 8, tokens: int = 4, vocabulary: int = 40) -> list[Tensor]:
    """Return token numbers in which some repeat, as words do."""
    generator = torch.Generator().manual_seed(2)
    numbers = torch.rand(n, tokens, generator=generator) ** 2 * vocabulary
    return list(numbers.long().split(1))

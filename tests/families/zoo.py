"""Tiny models of many families: real classes of transformers, and plain PyTorch; random weights.

`benchmarks/families.py` measures what the tests check.
"""
# transformers is not typed:
# mypy: disable-error-code="no-untyped-call, call-arg, arg-type"

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family"]

WORDS = 40
TOKENS = 4


@dataclass(frozen=True)
class Family:
    """A model, its inputs, and the parts of it that may be encrypted."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the model; its weights are drawn from PyTorch's generator."""
    parts: Mapping[str, str]
    """Dotted path of each part, under what it is."""
    shape: tuple[int, ...] = (1, TOKENS)
    """Of an input: token numbers, or real numbers if it has more than two axes."""
    tokens: int = TOKENS
    """Rows that an input becomes, by which look-ups are divided."""

    def model(self) -> nn.Module:
        """Return the model, the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().eval()

    def inputs(self, n: int, seed: int = 1) -> list[Tensor]:
        """Return n inputs: token numbers of which some are frequent, or smooth real numbers."""
        generator = torch.Generator().manual_seed(seed)
        if len(self.shape) == 2 and self.name != "MLP classifier":
            drawn = torch.rand(n, *self.shape, generator=generator) ** 2 * WORDS
            return list(drawn.long())
        drawn = torch.randn(n, *self.shape, generator=generator)
        return list(0.5 * drawn + 0.1)


def _config(kind: str, **changes: Any) -> Any:
    """Return a tiny configuration; names that a class does not know are its own affair."""
    import transformers

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": WORDS,
        "max_position_embeddings": 16,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return getattr(transformers, f"{kind}Config")(**{**sizes, **changes})


def _transformer(kind: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, f"{kind}Model")(_config(kind, **changes))
        return _spread_norms(model)

    return build


def _spread_norms(model: nn.Module) -> nn.Module:
    """Give every norm weights of its own, as training does: ones would hide a fault."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name.lower():
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=WORDS,
        relative_attention_num_buckets=4, relative_attention_max_distance=8,
        feed_forward_proj="gated-gelu", pad_token_id=0,
    )  # fmt: skip
    return _spread_norms(T5EncoderModel(config))


class _Classifier(nn.Module):
    """Two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh())
        self.norm = nn.LayerNorm(16)
        self.body = nn.Sequential(self.hidden, self.norm, nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).log_softmax(-1)  # type: ignore[no-any-return]


class _Convolutional(nn.Module):
    """Two convolutions with batch norm, maximum and average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.second = nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=1, groups=2, bias=False), nn.BatchNorm2d(6), nn.SiLU(),
            nn.AvgPool2d(2),
        )  # fmt: skip
        self.features = nn.Sequential(self.first, self.second, nn.Flatten())
        self.head = nn.Linear(6, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.get_buffer("running_mean").normal_(std=0.3)
                module.get_buffer("running_var").uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


def _llama_like(norm: str = "input_layernorm") -> dict[str, str]:
    block = "layers.0"
    return {
        "attention": f"{block}.self_attn", "MLP": f"{block}.mlp",
        "norm": f"{block}.{norm}", "block": block,
    }  # fmt: skip


def _bert_like() -> dict[str, str]:
    layer = "encoder.layer.0"
    return {
        "attention": f"{layer}.attention.self", "MLP": f"{layer}.intermediate",
        "norm": f"{layer}.attention.output.LayerNorm", "block": layer,
    }  # fmt: skip


FAMILIES = (
    Family("GPT-2", _transformer("GPT2", n_embd=16, n_head=4, n_layer=2, n_positions=16),
           {"attention": "h.0.attn", "MLP": "h.0.mlp", "norm": "h.0.ln_1", "block": "h.0"}),
    Family("GPT-NeoX", _transformer("GPTNeoX"),
           {"attention": "layers.0.attention", "MLP": "layers.0.mlp",
            "norm": "layers.0.input_layernorm", "block": "layers.0"}),
    Family("OPT", _transformer("OPT", ffn_dim=24, word_embed_proj_dim=16, init_std=0.3),
           {"attention": "layers.0.self_attn", "MLP": "layers.0.fc1",
            "norm": "layers.0.self_attn_layer_norm", "block": "layers.0"}),
    Family("LLaMA", _transformer("Llama", num_key_value_heads=2), _llama_like()),
    Family("Qwen2", _transformer("Qwen2", num_key_value_heads=2), _llama_like()),
    Family("Qwen3", _transformer("Qwen3", num_key_value_heads=2, head_dim=4), _llama_like()),
    Family("Mistral", _transformer("Mistral", num_key_value_heads=2, sliding_window=2),
           _llama_like()),
    Family("Phi", _transformer("Phi", num_key_value_heads=4),
           {**_llama_like(), "block": "layers.0"}),
    Family("Gemma", _transformer("Gemma", num_key_value_heads=1, head_dim=4), _llama_like()),
    Family("BERT", _transformer("Bert"), _bert_like()),
    Family("DistilBERT", _transformer("DistilBert", dim=16, hidden_dim=24, n_heads=4, n_layers=2),
           {"attention": "transformer.layer.0.attention", "MLP": "transformer.layer.0.ffn",
            "norm": "transformer.layer.0.sa_layer_norm", "block": "transformer.layer.0"}),
    Family("RoBERTa", _transformer("Roberta", type_vocab_size=1), _bert_like()),
    Family("ViT", _transformer("ViT", image_size=16, patch_size=8),
           {"attention": "layers.0.attention", "MLP": "layers.0.mlp",
            "norm": "layers.0.layernorm_before", "block": "layers.0",
            "patches": "embeddings.patch_embeddings"},
           shape=(1, 3, 16, 16), tokens=5),
    Family("T5 encoder", _t5,
           {"attention": "encoder.block.0.layer.0.SelfAttention",
            "MLP": "encoder.block.0.layer.1.DenseReluDense",
            "norm": "encoder.block.0.layer.0.layer_norm", "block": "encoder.block.0"}),
    Family("MLP classifier", _Classifier,
           {"MLP": "hidden", "norm": "norm", "block": "body"}, shape=(1, 8), tokens=1),
    Family("Convolutional", _Convolutional,
           {"convolution, maximum": "first", "convolution, average": "second",
            "block": "features"}, shape=(1, 2, 8, 8), tokens=1),
)  # fmt: skip

"""The families that are tried: classes of transformers with random weights, and plain networks.

What differs between them is written here, so that nothing in the package needs to know a name: how
a configuration is spelled, and where attention, MLP, norm and block stand.
"""
# transformers is not typed:
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fhe_fx

__all__ = ["FAMILIES", "PARTS", "Family"]

PARTS = ("attention", "mlp", "norm", "block")


@dataclass(frozen=True)
class Family:
    """A class of models, at a tiny size and at the size of a released one."""

    name: str
    parts: Mapping[str, str | tuple[str, str]]
    """Path of each part of its first block; for a plain network of the parts that it has. Of a part
    that is no submodule, the first and the last submodule of it."""
    config: str = ""
    """Configuration class of transformers; the model is the one that belongs to it."""
    model: str = ""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    real: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from the defaults of transformers, which are a released size."""
    of_pixels: bool = False
    refused: tuple[str, ...] = ()
    """Parts with operators that cannot run encrypted."""

    def build(self, *, is_tiny: bool = True, seed: int = 0) -> nn.Module:
        """Return a model with random weights, in eval mode."""
        import transformers

        torch.manual_seed(seed)
        if not self.config:
            plain = {"Classifier": Classifier, "Convolutions": Convolutions, "Encoder": Encoder}
            return plain[self.model]().eval()
        settings = self.tiny if is_tiny else self.real
        config = getattr(transformers, self.config)(**settings)
        model: nn.Module = getattr(transformers, self.model)(config).eval()
        return model

    def encrypt(
        self, model: nn.Module, names: Sequence[str], calibration: Sequence[Tensor], **settings: Any
    ) -> list[nn.Module]:
        """Encrypt parts: those that are submodules in one model, each other one in a graph of it.

        Raises:
            FheFxError: as `fhe_fx.encrypt_submodule`.
        """
        paths = [self.parts[n] for n in names if n in self.parts]
        whole = [p for p in paths if isinstance(p, str)]
        settings["calibration"] = calibration
        made = [fhe_fx.encrypt_submodule(model, whole, **settings)] if whole else []
        return made + [
            fhe_fx.encrypt_submodule(
                fhe_fx.trace(model, calibration[0]), from_nodes=p[0], to_nodes=p[1], **settings
            )
            for p in paths
            if not isinstance(p, str)
        ]

    def rows(self, model: nn.Module, tokens: int) -> int:
        """Return the rows of an input of that many words: tokens, patches, or one sample."""
        if not self.config:
            return tokens if self.model == "Encoder" else 1
        config: Any = model.config
        return (config.image_size // config.patch_size) ** 2 + 1 if self.of_pixels else tokens

    def inputs(self, model: nn.Module, n: int, tokens: int) -> list[Tensor]:
        """Return inputs of the whole model: words of which some repeat, or smooth images."""
        generator = torch.Generator().manual_seed(3)
        if isinstance(model, Classifier):
            return [0.5 * torch.randn(1, 6, generator=generator) + 0.1 for _ in range(n)]
        if isinstance(model, Encoder):
            return [0.5 * torch.randn(1, tokens, 8, generator=generator) + 0.1 for _ in range(n)]
        if isinstance(model, Convolutions):
            return [_image(1, 8, generator) for _ in range(n)]
        config: Any = model.config
        if self.of_pixels:
            return [_image(config.num_channels, config.image_size, generator) for _ in range(n)]
        numbers = torch.rand(n, tokens, generator=generator) ** 2 * (config.vocab_size - 4)
        return list((numbers.long() + 3).split(1))  # the first words are marks, such as padding


def _image(channels: int, side: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(1, channels, 2, 2, generator=generator)
    return nn.functional.interpolate(coarse, (side, side), mode="bilinear")


class Classifier(nn.Module):
    """An MLP behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.block = nn.Sequential(self.norm, self.mlp)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


class Convolutions(nn.Module):
    """Convolution, batch norm, average and maximum pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.block = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            self.norm,
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(2, 2, 3),
            nn.MaxPool2d(2),
        )
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
        with torch.no_grad():
            self.norm.running_mean.copy_(torch.tensor([0.1, -0.2]))  # type: ignore[union-attr]
            self.norm.running_var.copy_(torch.tensor([0.5, 1.5]))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.block(x))
        return y


class EncoderBlock(nn.Module):
    """Norm, torch.nn's attention, residual, norm, MLP, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        y = x + y
        z: Tensor = y + self.mlp(self.norm_2(y))
        return z


class Encoder(nn.Module):
    """One block of modules of torch.nn, norms first, as torchvision's ViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = EncoderBlock()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


_DECODER: dict[str, str | tuple[str, str]] = {
    "attention": "layers.0.self_attn",
    "mlp": "layers.0.mlp",
    "norm": "layers.0.input_layernorm",
    "block": "layers.0",
}
_ENCODER: dict[str, str | tuple[str, str]] = {
    "attention": "encoder.layer.0.attention.self",
    "mlp": ("encoder.layer.0.intermediate", "encoder.layer.0.output.dense"),
    "norm": "encoder.layer.0.output.LayerNorm",
    "block": "encoder.layer.0",
}
_TINY = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TINY, "num_key_value_heads": 1}
_ONE = {"num_hidden_layers": 1, "vocab_size": 512}
"""Of a released size, but for what the parts of a block do not see."""

FAMILIES = {
    f.name: f
    for f in (
        Family(
            "GPT-2",
            {"attention": "h.0.attn", "mlp": "h.0.mlp", "norm": "h.0.ln_1", "block": "h.0"},
            "GPT2Config",
            "GPT2Model",
            {
                "n_embd": 8,
                "n_head": 2,
                "n_layer": 1,
                "n_positions": 16,
                "vocab_size": 40,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "initializer_range": 0.4,
            },
            {"n_layer": 1, "vocab_size": 512},
        ),
        Family(
            "GPT-NeoX",
            {**_DECODER, "attention": "layers.0.attention"},
            "GPTNeoXConfig",
            "GPTNeoXModel",
            _TINY,
            # the 160M model of the Pythia suite
            _ONE | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        ),
        Family(
            "OPT",
            {
                "attention": "decoder.layers.0.self_attn",
                "mlp": ("decoder.layers.0.fc1", "decoder.layers.0.fc2"),
                "norm": "decoder.layers.0.self_attn_layer_norm",
                "block": "decoder.layers.0",
            },
            "OPTConfig",
            "OPTModel",
            {
                **{k: v for k, v in _TINY.items() if k != "intermediate_size"},
                "ffn_dim": 12,
                "word_embed_proj_dim": 8,
                "init_std": 0.4,
            },
            _ONE,
        ),
        Family(
            "LLaMA",
            _DECODER,
            "LlamaConfig",
            "LlamaModel",
            _GROUPED,
            # a published decoder of 135M parameters
            _ONE
            | {
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
            },
        ),
        Family(
            "Qwen2",
            _DECODER,
            "Qwen2Config",
            "Qwen2Model",
            _GROUPED,
            _ONE
            | {
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
            },
        ),
        Family(
            "Qwen3",
            _DECODER,
            "Qwen3Config",
            "Qwen3Model",
            {**_GROUPED, "head_dim": 4},
            _ONE
            | {
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
            },
        ),
        Family(
            "Mistral",
            _DECODER,
            "MistralConfig",
            "MistralModel",
            {**_GROUPED, "sliding_window": 2},
            _ONE,
        ),
        Family(
            "Phi",
            _DECODER,
            "PhiConfig",
            "PhiModel",
            {**_TINY, "partial_rotary_factor": 0.5},
            _ONE,
        ),
        Family(
            "Gemma",
            _DECODER,
            "GemmaConfig",
            "GemmaModel",
            {**_GROUPED, "head_dim": 4},
            # the 2B model
            _ONE
            | {
                "hidden_size": 2048,
                "intermediate_size": 16384,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
            },
        ),
        Family("BERT", _ENCODER, "BertConfig", "BertModel", _TINY, _ONE),
        Family(
            "DistilBERT",
            {
                "attention": "transformer.layer.0.attention",
                "mlp": "transformer.layer.0.ffn",
                "norm": "transformer.layer.0.sa_layer_norm",
                "block": "transformer.layer.0",
            },
            "DistilBertConfig",
            "DistilBertModel",
            {
                "dim": 8,
                "hidden_dim": 12,
                "n_layers": 1,
                "n_heads": 2,
                "vocab_size": 40,
                "max_position_embeddings": 16,
                "initializer_range": 0.4,
            },
            {"n_layers": 1, "vocab_size": 512},
        ),
        Family(
            "RoBERTa",
            _ENCODER,
            "RobertaConfig",
            "RobertaModel",
            _TINY,
            _ONE,
        ),
        Family(
            "ViT",
            {
                "attention": "layers.0.attention",
                "mlp": "layers.0.mlp",
                "norm": "layers.0.layernorm_before",
                "block": "layers.0",
            },
            "ViTConfig",
            "ViTModel",
            {
                "hidden_size": 8,
                "intermediate_size": 12,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 4,
                "patch_size": 2,
                "num_channels": 1,
                "initializer_range": 0.4,
            },
            # four patches of the released size instead of 196
            {"num_hidden_layers": 1, "image_size": 32},
            of_pixels=True,
        ),
        Family(
            "T5 encoder",
            {
                "attention": "encoder.block.0.layer.0.SelfAttention",
                "mlp": "encoder.block.0.layer.1.DenseReluDense",
                "norm": "encoder.block.0.layer.0.layer_norm",
                "block": "encoder.block.0",
            },
            "T5Config",
            "T5EncoderModel",
            {
                "d_model": 8,
                "d_kv": 4,
                "d_ff": 12,
                "num_layers": 1,
                "num_heads": 2,
                "vocab_size": 40,
                "initializer_factor": 1.0,
            },
            {"num_layers": 1, "vocab_size": 512},
        ),
        Family(
            "Mixtral",
            _DECODER,
            "MixtralConfig",
            "MixtralModel",
            {**_GROUPED, "num_local_experts": 2},
            _ONE,
            refused=("mlp", "block"),
        ),
        Family(
            "MLP classifier", {"mlp": "mlp", "norm": "norm", "block": "block"}, model="Classifier"
        ),
        Family(
            "torch.nn encoder",
            {
                "attention": "block.attention",
                "mlp": "block.mlp",
                "norm": "block.norm_1",
                "block": "block",
            },
            model="Encoder",
        ),
        Family("small CNN", {"block": "block", "norm": "norm"}, model="Convolutions"),
    )
}

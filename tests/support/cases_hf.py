"""Hugging Face architectures at small random configurations, with attention masks of uneven length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.cases import CASES, Case

_TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 30}
_ENCODER = {**_TINY, "max_position_embeddings": 12}
_DECODER = {**_ENCODER, "pad_token_id": 0, "num_key_value_heads": 1}


class Pooled(nn.Module):
    """A backbone, the mean of its last hidden states over unmasked positions, and a linear head."""

    def __init__(self, backbone: nn.Module, size: int = 16, key: str = "last_hidden_state") -> None:
        super().__init__()
        self.backbone, self.head, self.key = backbone, nn.Linear(size, 2), key

    def forward(self, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        h = getattr(self.backbone(**inputs, **mask), self.key)
        if h.ndim == 4:
            h = h.flatten(2).transpose(1, 2)
        if attention_mask is None or attention_mask.shape != h.shape[:2]:
            return self.head(h.mean(1))
        weights = attention_mask[..., None].to(h.dtype)
        return self.head((h * weights).sum(1) / weights.sum(1))


def text(**extra: Any) -> dict[str, Tensor]:
    """Three sentences of 5 tokens, one of them shorter."""
    ids, mask = torch.randint(1, 30, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask, **extra}


def _classifier(name: str, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    import transformers

    made = getattr(transformers, f"{name}Config")(num_labels=2, **config)
    return getattr(transformers, f"{name}ForSequenceClassification")(made), text()


def _backbone(name: str, config: dict[str, Any], size: int = 16) -> tuple[nn.Module, Any]:
    import transformers

    made = getattr(transformers, f"{name.removesuffix('Encoder')}Config")(**config)
    return Pooled(getattr(transformers, f"{name}Model")(made), size), text()


def _image(name: str, config: dict[str, Any], side: int = 8) -> tuple[nn.Module, Any]:
    import transformers

    made = getattr(transformers, f"{name}Config")(num_labels=2, **config)
    return getattr(transformers, f"{name}ForImageClassification")(made), {"pixel_values": torch.randn(3, 3, side, side)}


_VIT = {k: v for k, v in _TINY.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
_DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 20, "vocab_size": 30, "max_position_embeddings": 12}
_GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30, "n_positions": 12, "pad_token_id": 0}
_NEO = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "pad_token_id": 0,
}
_XLNET = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 20, "vocab_size": 30}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 2,
    "d_ff": 20,
    "vocab_size": 30,
    "relative_attention_num_buckets": 8,
}
_OPT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 20,
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
    "word_embed_proj_dim": 8,
}
_BLOOM = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30, "pad_token_id": 0}
_MPT = {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 30, "max_seq_len": 12, "pad_token_id": 0}
_SWIN = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 2}
_CONVNEXT = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
_MIXTRAL = {**_DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "Bert": _ENCODER,
    "Roberta": {**_ENCODER, "pad_token_id": 0},
    "Albert": {**_ENCODER, "embedding_size": 8},
    "DistilBert": _DISTIL,
    "Electra": {**_ENCODER, "embedding_size": 8},
    "XLNet": _XLNET,
    "DebertaV2": {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4},
    "SqueezeBert": {**_ENCODER, "embedding_size": 16},
    "GPT2": _GPT2,
    "GPTNeo": _NEO,
    "GPTNeoX": {**_ENCODER, "pad_token_id": 0},
    "OPT": _OPT,
    "Bloom": _BLOOM,
    "Mpt": _MPT,
    "Llama": _DECODER,
    "Mistral": _DECODER,
    "Qwen2": _DECODER,
    "Gemma": {**_DECODER, "head_dim": 8},
    "Phi": _DECODER,
    "Mixtral": _MIXTRAL,
}
_BACKBONES: dict[str, dict[str, Any]] = {
    "T5Encoder": _T5,
    "Funnel": {"d_model": 16, "block_sizes": [1, 1], "n_head": 2, "d_head": 8, "d_inner": 20, "vocab_size": 30},
    "FNet": {k: v for k, v in _ENCODER.items() if k != "num_attention_heads"},
    "Mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 30, "time_step_rank": 2},
    "NomicBert": _ENCODER,
    "ModernBert": {**_ENCODER, "pad_token_id": 0, "global_attn_every_n_layers": 1},
}
_IMAGES: dict[str, dict[str, Any]] = {
    "ViT": _VIT,
    "DeiT": _VIT,
    "Beit": {**_VIT, "use_relative_position_bias": True},
    "Dinov2": {**_VIT, "mlp_ratio": 2},
    "Swin": _SWIN,
    "ConvNext": _CONVNEXT,
    "ResNet": _RESNET,
}

HEAVY = {"Mixtral", "Mamba", "DebertaV2", "Funnel", "Beit", "GPTNeoX", "Gemma", "Phi", "Qwen2", "Mpt", "DeiT"}
# torch.func fails on the masks of the others
FLOAT32_INSIDE = {"Funnel", "GPTNeo", "Llama", "Mistral", "Mixtral", "T5Encoder", "Gemma", "Qwen2", "Mamba"}
FUNCTIONAL = {"XLNet", "DebertaV2", "GPTNeo", "Mpt", "Funnel", "FNet", *_IMAGES}


def _cases() -> list[Case]:
    tables = ((_classifier, _CLASSIFIERS), (_backbone, _BACKBONES), (_image, _IMAGES))
    return [
        Case(
            f"hf_{name}",
            lambda kind=kind, name=name, config=config: kind(name, dict(config)),  # type: ignore[misc]
            outputs=2,
            notes="Hugging Face",
            functional=name in FUNCTIONAL,
            heavy=name in HEAVY,
            float32_inside=name in FLOAT32_INSIDE,
        )
        for kind, table in tables
        for name, config in table.items()
    ]


CASES += _cases()

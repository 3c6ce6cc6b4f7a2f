"""More Hugging Face architectures, for the soak: every one against the naive loop, whichever engine is chosen."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.support.cases_hf import _DECODER, _ENCODER, _VIT, _classifier, _image

_POOLS = {"hidden_sizes": [8] * 4, "depths": [1] * 4}
_HEADS = {**_POOLS, "num_attention_heads": [1] * 4}
_GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2}
_TEXT: dict[str, dict[str, Any]] = {
    **{key: {} for key in ("Camembert", "XLMRoberta", "MPNet", "Ernie", "MegatronBert", "IBert", "LayoutLM")},
    "Data2VecText": {},
    "ConvBert": {"embedding_size": 16},
    "RoFormer": {"embedding_size": 16},
    "BigBird": {"attention_type": "original_full"},
    "Longformer": {"attention_window": 4},
    "MobileBert": {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    "Deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
}
_CAUSAL: dict[str, dict[str, Any]] = {
    **{key: {} for key in ("StableLm", "Starcoder2", "Olmo", "Phi3", "Falcon", "Persimmon", "JetMoe", "SmolLM3")},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8},
    "GPTBigCode": {},
    "CTRL": {**_GPT, "dff": 20},
    "OpenAIGPT": _GPT,
    "GPTJ": {**_GPT, "rotary_dim": 4},
}
_PICTURES: dict[str, tuple[dict[str, Any], int]] = {
    "ViTMSN": (_VIT, 8),
    "ConvNextV2": ({"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "patch_size": 2}, 16),
    "MobileNetV1": ({"depth_multiplier": 0.25}, 32),
    "MobileNetV2": ({"depth_multiplier": 0.25}, 32),
    "PoolFormer": (_POOLS, 32),
    "Pvt": ({**_HEADS, "image_size": 32}, 32),
    "Segformer": (_HEADS, 32),
}
NAMES = (*_TEXT, *_CAUSAL, *_PICTURES)


def build_more(name: str) -> tuple[nn.Module, Any]:
    """A small random configuration and a batch of three."""
    if name in _PICTURES:
        config, side = _PICTURES[name]
        return _image(name, dict(config), side)
    base = {**_ENCODER, "pad_token_id": 0} if name in _TEXT else _DECODER
    return _classifier(name, {**base, **(_TEXT.get(name) or _CAUSAL.get(name) or {})})

"""Small multimodal models of every class whose text model we read, by transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

from tests.models.families import SLIDING, TINY, YARN_ROPE

TEXT = {k: v for k, v in TINY.items() if k != "attn_implementation"}
SEEN = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SEEN |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def _llama() -> Any:
    return t.LlamaConfig(**TEXT)


def _clip() -> Any:
    return t.CLIPVisionConfig(**SEEN)


def _gemma3() -> Any:
    text = t.Gemma3TextConfig(**TEXT, head_dim=16, layer_types=[SLIDING] * 3, sliding_window=5)
    seen = t.SiglipVisionConfig(**SEEN)
    return t.Gemma3Config(text_config=text, vision_config=seen, mm_tokens_per_image=1)


def _mistral3(text: Any, tied: bool) -> Any:
    seen = t.PixtralVisionConfig(**SEEN)
    return t.Mistral3Config(text_config=text, vision_config=seen, tie_word_embeddings=tied)


def _ministral3() -> Any:
    rope = YARN_ROPE | {"llama_4_scaling_beta": 0.4}
    own = t.Ministral3Config(**TEXT, pad_token_id=None, head_dim=16, rope_parameters=rope)
    return _mistral3(own, tied=True)  # and its text_config says that it is not


def _small3() -> Any:
    return _mistral3(t.MistralConfig(**TEXT, head_dim=16, sliding_window=None), tied=False)


HEARD = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HEARD |= {"intermediate_size": 16, "num_mel_bins": 8, "max_source_positions": 8}


def _qwen(config: Any, **seen: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    seen |= {"depth": 1, "num_heads": 2, "patch_size": 4, "num_position_embeddings": 16}
    return config(text_config=TEXT | {"head_dim": 8, "rope_parameters": rope}, vision_config=seen)


WHOLES: dict[str, Callable[[], Any]] = {
    "gemma3": _gemma3,
    "mistral3": _ministral3,
    "mistral3-small": _small3,
    "llava": lambda: t.LlavaConfig(text_config=_llama(), vision_config=_clip()),
    "llava_next": lambda: t.LlavaNextConfig(text_config=_llama(), vision_config=_clip()),
    "llava_onevision": lambda: t.LlavaOnevisionConfig(
        text_config=t.Qwen2Config(**TEXT), vision_config=t.SiglipVisionConfig(**SEEN)
    ),
    "vipllava": lambda: t.VipLlavaConfig(text_config=_llama(), vision_config=_clip()),
    "internvl": lambda: t.InternVLConfig(
        text_config=t.Qwen3Config(**TEXT, head_dim=16),
        vision_config=t.InternVLVisionConfig(**SEEN | {"image_size": [8, 8], "patch_size": [4, 4]}),
    ),
    "idefics3": lambda: t.Idefics3Config(text_config=_llama(), vision_config=SEEN),
    "smolvlm": lambda: t.SmolVLMConfig(text_config=_llama(), vision_config=SEEN),
    "llava_next_video": lambda: t.LlavaNextVideoConfig(text_config=_llama(), vision_config=_clip()),
    "video_llava": lambda: t.VideoLlavaConfig(text_config=_llama(), vision_config=_clip()),
    "idefics2": lambda: t.Idefics2Config(
        text_config=t.MistralConfig(**TEXT),
        vision_config=SEEN,
        perceiver_config={"resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
        | {"num_key_value_heads": 1, "hidden_size": 32},
    ),
    "deepseek_vl": lambda: t.DeepseekVLConfig(
        text_config=_llama(), vision_config=t.SiglipVisionConfig(**SEEN)
    ),
    "got_ocr2": lambda: t.GotOcr2Config(
        text_config=t.Qwen2Config(**TEXT),
        vision_config={"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "image_size": 32, "patch_size": 4, "mlp_dim": 16}
        | {"global_attn_indexes": [0], "window_size": 2},
    ),
    "ovis2": lambda: t.Ovis2Config(
        text_config=t.Qwen2Config(**TEXT), vision_config=SEEN | {"vocab_size": 32}, hidden_size=32
    ),
    "voxtral": lambda: t.VoxtralConfig(text_config=_llama(), audio_config=HEARD),
    "qwen2_audio": lambda: t.Qwen2AudioConfig(
        text_config=t.Qwen2Config(**TEXT),
        audio_config={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2}
        | {"encoder_ffn_dim": 16, "num_mel_bins": 8, "max_source_positions": 8},
    ),
    "audioflamingo3": lambda: t.AudioFlamingo3Config(
        text_config=t.Qwen2Config(**TEXT), audio_config=HEARD
    ),
    "qwen2_vl": lambda: _qwen(t.Qwen2VLConfig, embed_dim=16, hidden_size=32),
    "qwen2_5_vl": lambda: _qwen(t.Qwen2_5_VLConfig, hidden_size=16, out_hidden_size=32),
    "qwen3_vl": lambda: _qwen(t.Qwen3VLConfig, hidden_size=16, out_hidden_size=32),
}


def whole_model(name: str, vocab_size: int = 96) -> Any:
    """One with random weights that make every part of it matter."""
    torch.manual_seed(0)
    config = WHOLES[name]()
    config.text_config.vocab_size = vocab_size
    kind = type(config).__name__.replace("Config", "ForConditionalGeneration")
    made = getattr(t, kind)(config).eval()
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(param + 0.2 * torch.randn_like(param))
    return made

"""Small configs of every release that our families cover, beside transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING, FULL = "sliding_attention", "full_attention"
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3_ROPE = {
    FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
OLMO3_ROPE = {
    FULL: YARN_ROPE | {"rope_theta": 5e5, "attention_factor": 1.1},
    SLIDING: {"rope_type": "default", "rope_theta": 5e5},
}
# Of all rows that tests have, none is shorter than the original: transformers turns by each batch.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.0, 1.0],
    "long_factor": [1.0, 2.0, 4.0],
}


_MAKERS: dict[str, Callable[[], Any]] = {
    "llama2": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TINY)),
    "llama3": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE)),
    "llama-yarn": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TINY, rope_parameters=YARN_ROPE)),
    "llama-linear": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(
            **TINY,
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            mlp_bias=True,
        )
    ),
    "llama-dynamic": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(
            **TINY, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        )
    ),
    "llama-bias": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TINY, attention_bias=True)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**TINY, sliding_window=5, head_dim=16)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TINY, tie_word_embeddings=True)),
    "qwen2-window": lambda: t.Qwen2ForCausalLM(
        t.Qwen2Config(**TINY, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "qwen3-types": lambda: t.Qwen3ForCausalLM(
        t.Qwen3Config(
            **TINY,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=0,
            layer_types=[SLIDING, FULL, SLIDING],
            rope_parameters=YARN_ROPE | {"truncate": False, "mscale": 1.5, "mscale_all_dim": 0.5},
        )
    ),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TINY, head_dim=16)),
    "smollm2": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**TINY | {"num_attention_heads": 2}, tie_word_embeddings=True)
    ),
    "ministral": lambda: t.MinistralForCausalLM(
        t.MinistralConfig(
            **TINY, sliding_window=5, head_dim=16, layer_types=[SLIDING, FULL, SLIDING]
        )
    ),
    "gemma2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(
            **TINY,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=5,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
        )
    ),
    "gemma3": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(
            **TINY,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=5,
            final_logit_softcapping=5.0,
            layer_types=[SLIDING, FULL, SLIDING],
            rope_parameters=GEMMA3_ROPE,
        )
    ),
    "olmo3": lambda: t.Olmo3ForCausalLM(
        t.Olmo3Config(
            **TINY,
            pad_token_id=None,
            sliding_window=5,
            layer_types=[SLIDING, FULL, SLIDING],
            rope_parameters=OLMO3_ROPE,
        )
    ),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**TINY, pad_token_id=None)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=96,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
        )
    ),
    "smollm3": lambda: t.SmolLM3ForCausalLM(
        t.SmolLM3Config(**TINY, pad_token_id=None, no_rope_layers=[1, 0, 1])
    ),
    "smollm3-window": lambda: t.SmolLM3ForCausalLM(
        t.SmolLM3Config(
            **TINY,
            pad_token_id=None,
            no_rope_layers=[1, 0, 1],
            attention_bias=True,
            mlp_bias=True,
            use_sliding_window=True,
            sliding_window=5,
        )
    ),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**TINY, pad_token_id=None, sliding_window=5)),
    "phi4-longrope": lambda: t.Phi3ForCausalLM(
        t.Phi3Config(
            **TINY,
            pad_token_id=None,
            tie_word_embeddings=True,
            original_max_position_embeddings=4,
            rope_parameters=LONGROPE,
        )
    ),
    "granite": lambda: t.GraniteForCausalLM(
        t.GraniteConfig(
            **TINY,
            embedding_multiplier=12.0,
            attention_multiplier=0.2,
            residual_multiplier=0.22,
            logits_scaling=1.5,
        )
    ),
    "granite-swa": lambda: t.GraniteSWAForCausalLM(
        t.GraniteSWAConfig(
            **TINY,
            embedding_multiplier=12.0,
            attention_multiplier=0.2,
            residual_multiplier=0.22,
            logits_scaling=1.5,
            sliding_window=5,
            layer_types=[FULL, SLIDING, SLIDING],
            layer_rope_theta=[0.0, 1e4, 2e3],
        )
    ),
    "ministral3": lambda: t.Ministral3ForCausalLM(
        t.Ministral3Config(
            **TINY,
            pad_token_id=None,
            head_dim=16,
            rope_parameters=YARN_ROPE
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4},
        )
    ),
    "ministral3-window": lambda: t.Ministral3ForCausalLM(
        t.Ministral3Config(
            **TINY,
            pad_token_id=None,
            head_dim=16,
            sliding_window=5,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
                "llama_4_scaling_beta": 0.0,
            },
        )
    ),
    "seed-oss": lambda: t.SeedOssForCausalLM(
        t.SeedOssConfig(**TINY, pad_token_id=None, head_dim=16, attention_out_bias=True)
    ),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**TINY, pad_token_id=None, head_dim=16)),
    "starcoder2": lambda: t.Starcoder2ForCausalLM(t.Starcoder2Config(**TINY, sliding_window=5)),
    "exaone4": lambda: t.Exaone4ForCausalLM(
        t.Exaone4Config(**TINY, sliding_window=5, layer_types=[SLIDING, FULL, SLIDING])
    ),
    "exaone4-full": lambda: t.Exaone4ForCausalLM(
        t.Exaone4Config(
            **TINY, sliding_window=None, layer_types=[FULL] * 3, rope_parameters=LLAMA3_ROPE
        )
    ),
    "glm": lambda: t.GlmForCausalLM(
        t.GlmConfig(
            **TINY,
            pad_token_id=None,
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4}
            | {"partial_rotary_factor": 0.75},
        )
    ),
    "glm4": lambda: t.Glm4ForCausalLM(t.Glm4Config(**TINY, pad_token_id=None, head_dim=16)),
    "helium": lambda: t.HeliumForCausalLM(
        t.HeliumConfig(**TINY, pad_token_id=None, head_dim=8, attention_bias=True, mlp_bias=True)
    ),
    "ernie4_5": lambda: t.Ernie4_5ForCausalLM(
        t.Ernie4_5Config(
            **TINY, pad_token_id=None, head_dim=16, use_bias=True, rope_parameters=YARN_ROPE
        )
    ),
    "arcee": lambda: t.ArceeForCausalLM(
        t.ArceeConfig(**TINY, mlp_bias=True, attention_bias=True, head_dim=16)
    ),
    "nemotron": lambda: t.NemotronForCausalLM(
        t.NemotronConfig(
            **TINY | {"num_hidden_layers": 2}, head_dim=16, mlp_bias=True, attention_bias=True
        )
    ),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(
        t.GPTNeoXConfig(**{k: v for k, v in TINY.items() if k != "num_key_value_heads"})
    ),
    "gpt_neox-sequential": lambda: t.GPTNeoXForCausalLM(
        t.GPTNeoXConfig(
            **{k: v for k, v in TINY.items() if k != "num_key_value_heads"},
            use_parallel_residual=False,
            attention_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e3}
            | {"partial_rotary_factor": 0.5},
        )
    ),
    "cohere": lambda: t.CohereForCausalLM(
        t.CohereConfig(**TINY, pad_token_id=None, attention_bias=True, logit_scale=0.5)
    ),
    "cohere2": lambda: t.Cohere2ForCausalLM(
        t.Cohere2Config(
            **TINY,
            pad_token_id=None,
            logit_scale=0.5,
            sliding_window=5,
            layer_types=[SLIDING, FULL, SLIDING],
        )
    ),
}
FAMILIES = tuple(_MAKERS)


def hf_model(name: str) -> Any:
    """A transformers model with random weights that make every part of it matter."""
    torch.manual_seed(0)
    model = _MAKERS[name]().eval()
    with torch.no_grad():
        for param in model.parameters():
            # Norms near one, biases near zero, but none of them trivially so.
            param.copy_(param + 0.2 * torch.randn_like(param))
    return model


def inputs(num_rows: int = 2, num_tokens: int = 40) -> tuple[Tensor, Tensor]:
    """Random ids and their positions."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(96, (num_rows, num_tokens), generator=generator)
    return ids, torch.arange(num_tokens).expand(num_rows, -1)

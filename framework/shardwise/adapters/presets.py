"""Published settings of adapters. Rates, schedules and batches are the stage's, and not here."""

from __future__ import annotations

from shardwise.config.presets import Preset

ALL_LINEAR = "all-linear"

ADAPTER_PRESETS: dict[str, Preset] = {
    "lora_gpt2": Preset(
        "Hu et al. 2021, arXiv:2106.09685, appendix D, GPT-2: queries and values, rank 4, alpha 32",
        {"kind": "lora", "rank": 4, "alpha": 32.0, "targets": ["q", "v"]},
    ),
    "qlora_paper": Preset(
        "Dettmers et al. 2023, arXiv:2305.14314, appendix B.2: all linear layers, rank 64, alpha "
        "16, dropout 0.1 (up to 13B; 0.05 beyond), NF4 with double quantisation",
        {
            "kind": "lora",
            "rank": 64,
            "alpha": 16.0,
            "targets": [ALL_LINEAR],
            "dropout": 0.1,
            "quantise": "nf4",
        },
    ),
    "dora_paper": Preset(
        "Liu et al. 2024, arXiv:2402.09353, LLaMA on commonsense reasoning: rank 32, alpha twice "
        "that, dropout 0.05, of queries, keys, values, up and down projections",
        {
            "kind": "dora",
            "rank": 32,
            "alpha": 64.0,
            "targets": ["q", "k", "v", "up", "down"],
            "dropout": 0.05,
        },
    ),
    "pissa_paper": Preset(
        "Meng et al. 2024, arXiv:2404.02948, section 5.1: all linear layers, rank and alpha 128, "
        "no dropout",
        {
            "kind": "lora",
            "init": "pissa",
            "rank": 128,
            "alpha": 128.0,
            "targets": [ALL_LINEAR],
            "dropout": 0.0,
        },
    ),
    "lora_without_regret": Preset(
        "Schulman et al. 2025, thinkingmachines.ai/blog/lora: all linear layers, scaled by alpha / "
        "rank with alpha 32; the rank by what there is to learn, 1 may do in policy gradients",
        {"kind": "lora", "alpha": 32.0, "rslora": False, "targets": [ALL_LINEAR]},
    ),
    "peft_default": Preset(
        "PEFT 0.21 LoraConfig: r 8, lora_alpha 8, no dropout; q_proj and v_proj of a Llama",
        {"kind": "lora", "rank": 8, "alpha": 8.0, "dropout": 0.0, "targets": ["q", "v"]},
    ),
    "trl_default": Preset(
        "TRL 1.16 ModelConfig: lora_r 16, lora_alpha 32, lora_dropout 0.05; without target modules "
        "those of PEFT",
        {"kind": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": ["q", "v"]},
    ),
}

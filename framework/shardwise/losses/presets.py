"""Published settings of losses, as data: what each source says, and where.

Only what the loss and the advantage decide is here. Sampling (group size, dynamic sampling,
overlong penalties) belongs to the stage, and ``length_constant`` to the user's response length.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardwise.config.presets import Preset

PRESETS: dict[str, Preset] = {
    "grpo_deepseekmath": Preset(
        "Shao et al. 2024, arXiv:2402.03300, equations 3 and 4, section 4.2 (beta 0.04; the clip "
        "range is not stated, PPO's 0.2 is taken)",
        {
            "advantage": "group_std",
            "ratio": "token",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": None,
            "kl": "k3",
            "kl_coef": 0.04,
            "aggregation": "seq_mean_token_mean",
        },
    ),
    "dapo_paper": Preset(
        "Yu et al. 2025, arXiv:2503.14476, equations 8 to 10, section 4.1",
        {
            "advantage": "group_std",
            "ratio": "token",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "dual_clip": None,
            "kl": "none",
            "kl_coef": 0.0,
            "aggregation": "token_mean",
        },
    ),
    "dr_grpo": Preset(
        "Liu et al. 2025, arXiv:2503.20783, section 3.2 (needs length_constant)",
        {
            "advantage": "group",
            "ratio": "token",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": None,
            "kl": "none",
            "kl_coef": 0.0,
            "aggregation": "constant",
        },
    ),
    "gspo": Preset(
        "Zheng et al. 2025, arXiv:2507.18071, equations 5 to 7, section 5.1 (3e-4, 4e-4)",
        {
            "advantage": "group_std",
            "ratio": "sequence",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "dual_clip": None,
            "kl": "none",
            "kl_coef": 0.0,
            "aggregation": "seq_mean_token_mean",
        },
    ),
    "trl_default": Preset(
        "TRL 1.16 GRPOConfig: epsilon 0.2, beta 0, loss_type dapo, scale_rewards group (eps 1e-4)",
        {
            "advantage": "group_std",
            "advantage_eps": 1e-4,
            "ratio": "token",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": None,
            "kl": "none",
            "kl_coef": 0.0,
            "aggregation": "token_mean",
        },
    ),
    "verl_default": Preset(
        "verl actor.yaml at 03d67c62: clip_ratio 0.2, clip_ratio_c 3, token-mean, no KL loss; "
        "GRPO advantage with std + 1e-6",
        {
            "advantage": "group_std",
            "advantage_eps": 1e-6,
            "ratio": "token",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": 3.0,
            "kl": "none",
            "kl_coef": 0.0,
            "aggregation": "token_mean",
        },
    ),
}


PPO_PRESETS: dict[str, Preset] = {
    "ziegler_2019": Preset(
        "Ziegler et al. 2019, arXiv:1909.08593, section 2.2 (adaptive KL, gain 0.1), with the "
        "start 0.2 and the target of 6 nats a response that TRL 0.4.1 documents for it",
        {
            "objective": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "value_clip": 0.2,
            "gamma": 1.0,
            "lam": 0.95,
            "kl": "k1",
            "kl_coef": 0.2,
            "kl_target": 6.0,
            "kl_gain": 0.1,
            "whiten_rewards": True,
        },
    ),
    "trl_default": Preset(
        "TRL 1.12 experimental PPOConfig: cliprange 0.2, cliprange_value 0.2, gamma 1, lam 0.95, "
        "kl_coef 0.05 with estimator k1, rewards not whitened",
        {
            "objective": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": None,
            "value_clip": 0.2,
            "gamma": 1.0,
            "lam": 0.95,
            "kl": "k1",
            "kl_coef": 0.05,
            "kl_target": None,
            "whiten_rewards": False,
        },
    ),
    "verl_default": Preset(
        "verl 4a2cba76, trainer/config: clip_ratio 0.2, clip_ratio_c 3, cliprange_value 0.5, "
        "gamma 1, lam 1, kl_coef 0.001, token-mean",
        {
            "objective": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": 3.0,
            "value_clip": 0.5,
            "gamma": 1.0,
            "lam": 1.0,
            "kl": "k1",
            "kl_coef": 0.001,
            "kl_target": None,
            "aggregation": "token_mean",
        },
    ),
    "openrlhf_default": Preset(
        "OpenRLHF train_ppo_ray.py: eps_clip 0.2, value_clip 0.5, gamma 1, lambd 1, "
        "init_kl_coef 0.01",
        {
            "objective": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": None,
            "value_clip": 0.5,
            "gamma": 1.0,
            "lam": 1.0,
            "kl": "k1",
            "kl_coef": 0.01,
            "kl_target": None,
        },
    ),
}


PREFERENCE_PRESETS: dict[str, Preset] = {
    "dpo_paper": Preset(
        "Rafailov et al. 2023, arXiv:2305.18290, equation 7, appendix B (beta 0.1)",
        {"kind": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "divergence": "reverse_kl"},
    ),
    "trl_default": Preset(
        "TRL 1.16 DPOConfig: loss_type sigmoid, beta 0.1, label_smoothing 0, reverse_kl",
        {"kind": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "divergence": "reverse_kl"},
    ),
    "iterative_rpo": Preset(
        "Pang et al. 2024, arXiv:2404.19733, equations 1 and 2, section 3.1 (beta 0.1, alpha 1); "
        "here the NLL is a mean over the answer's tokens, there over the prompt's, too",
        {
            "kind": "sigmoid",
            "beta": 0.1,
            "sft_weight": 1.0,
            "sft_aggregation": "seq_mean_token_mean",
        },
    ),
    "discopop": Preset(
        "Lu et al. 2024, arXiv:2406.08414, equation 5 (LRML); tau 0.05 and beta 0.1 as TRL 1.16",
        {"kind": "discopop", "beta": 0.1, "tau": 0.05},
    ),
    "simpo_llama3": Preset(
        "Meng et al. 2024, arXiv:2405.14734, equation 6; beta 2, gamma 1 as their repository's "
        "llama-3-8b-base-simpo.yaml",
        {"kind": "simpo", "beta": 2.0, "margin": 1.0, "label_smoothing": 0.0},
    ),
    "orpo_paper": Preset(
        "Hong et al. 2024, arXiv:2403.07691, equations 6 and 7 (lambda 0.1 for Mistral)",
        {"kind": "orpo", "beta": 0.1, "sft_weight": 1.0, "sft_aggregation": "token_mean"},
    ),
    "cpo_paper": Preset(
        "Xu et al. 2024, arXiv:2401.08417, equations 3 and 5 (beta 0.1)",
        {"kind": "cpo", "beta": 0.1, "sft_weight": 1.0, "sft_aggregation": "seq_mean_token_sum"},
    ),
    "kto_paper": Preset(
        "Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8 (beta 0.1, both weights 1)",
        {"kind": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    ),
}

# By the kind of stage whose loss they fill.
FAMILIES: dict[str, Mapping[str, Preset]] = {
    "grpo": PRESETS,
    "ppo": PPO_PRESETS,
    "dpo": PREFERENCE_PRESETS,
}

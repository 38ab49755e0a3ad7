"""Per-token estimators of KL(policy || reference) from the log-probabilities of sampled tokens.

With d = logp_ref - logp (Schulman 2020, "Approximating KL Divergence"):

    k1 = -d             unbiased value; as a loss its expected gradient is zero
    k2 = d^2 / 2        biased value; as a loss its on-policy gradient is that of the KL
    k3 = e^d - d - 1    unbiased value, never negative; as a loss its gradient is that of
                        KL(reference || policy)

So k1 belongs in the reward, k2 in the loss, and k3 in a plot; GRPO's paper uses k3 in the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

_MAX_LOG_RATIO = 20.0  # e^20 is 5e8: large enough to matter, far from fp32's infinity


def kl_estimate(kind: KLEstimator, logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """The estimator ``kind`` per token, in nats; differentiable in ``logp_BT``.

    k3 clamps d to +-20, as its exponential would overflow.
    """
    d_BT = ref_logp_BT - logp_BT
    if kind == "k1":
        return -d_BT
    if kind == "k2":
        return 0.5 * d_BT.square()
    if kind != "k3":
        raise ValueError(f"unknown KL estimator {kind!r}; known: k1, k2, k3")
    d_BT = d_BT.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return torch.expm1(d_BT) - d_BT

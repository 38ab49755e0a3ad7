"""AdamW with 8-bit moments: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization".

A moment is a code an element and a largest magnitude a block of 256 elements. Blocks are those of
the flattened *global* tensor, and so is the size from which on moments are 8-bit: how ranks cut a
tensor changes no number. Codes are cut as the parameter is, so a checkpoint holds global codes and
magnitudes, to be loaded under any layout; magnitudes, 1/64 of a moment's fp32 bytes, are whole on
every rank. The maps are bitsandbytes' (dynamic trees, section 2.2).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from shardwise.config.optimizers import AdamW8bitConfig
from shardwise.optim import parts
from shardwise.optim.rule import RuleOptimizer, bias_correction, counter

BLOCK = 256
LEAST = 4096  # elements of a tensor with 8-bit moments
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(RuleOptimizer):
    """Small tensors have AdamW's own states."""

    config: AdamW8bitConfig

    def start(self, name: str, param: Parameter) -> dict[str, Tensor]:
        """See `RuleOptimizer`."""
        state = {"step": counter()}
        for key in MOMENTS:
            if param.numel() < LEAST:
                state[key] = parts.zeros(param)
            else:
                state[f"{key}_codes"] = parts.zeros(param, dtype=torch.uint8)
                length = -(-param.numel() // BLOCK)
                state[f"{key}_absmax"] = parts.vector(param, length, param.dtype)
        return state

    def update(
        self, param: Parameter, weight: Tensor, grad: Tensor, state: dict[str, Any], group: Any
    ) -> None:
        """See `RuleOptimizer`."""
        lr, config = group["lr"], self.config
        block = None if "exp_avg" in state else parts.flat_index(param).div_(
            BLOCK, rounding_mode="floor"
        )  # fmt: skip
        m, v = (_read(state, key, block, weight.dtype) for key in MOMENTS)
        m.lerp_(grad, 1 - config.beta1)
        v.mul_(config.beta2).addcmul_(grad, grad, value=1 - config.beta2)
        weight.mul_(1 - lr * group["weight_decay"])
        root = (v / bias_correction(config.beta2, state)).sqrt_().add_(config.eps)
        weight.addcdiv_(m, root, value=-lr / bias_correction(config.beta1, state))
        if block is not None:
            for key, value in zip(MOMENTS, (m, v), strict=True):
                _write(state, key, block, value, param)


def _read(state: dict[str, Any], key: str, block: Tensor | None, dtype: torch.dtype) -> Tensor:
    """This rank's part of a moment."""
    if block is None:
        return parts.local_tensor(state[key])
    codes, absmax = (parts.local_tensor(state[f"{key}_{what}"]) for what in ("codes", "absmax"))
    return code_map(key == "exp_avg").to(absmax)[codes.long()].mul_(absmax[block])


def _write(state: dict[str, Any], key: str, block: Tensor, value: Tensor, param: Parameter) -> None:
    codes, absmax = (parts.local_tensor(state[f"{key}_{what}"]) for what in ("codes", "absmax"))
    absmax.zero_().scatter_reduce_(0, block.view(-1), value.abs().view(-1), "amax")
    parts.maximum(absmax, param)
    scaled = value / absmax[block].clamp_(min=torch.finfo(value.dtype).tiny)
    levels = code_map(key == "exp_avg").to(value)
    codes.copy_(torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2))


@functools.cache
def code_map(signed: bool) -> Tensor:
    """fp32 [256]: what the codes stand for, ascending, relative to the largest of a block.

    Seven decades, each with twice as many levels as the one below; zero and one besides.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        number = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, number + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        levels += [middles, -middles] if signed else [middles]
    return torch.cat(levels).sort().values

"""Model FLOPs per token, from plain numbers (no model object).

Convention, used everywhere in this project: a multiply-add counts as two, the backward pass as
twice the forward pass, recomputation is not counted, and

    forward   2 N + 2 L w s      training   6 N + 6 L w s      per token,

where N counts the parameters without the *input* embedding (the output head once, tied or not),
L the layers, w = heads * head_dim, s the sequence length. The second term is causal attention:
a query sees s / 2 keys on average. With ``causal=False`` it sees s and the term doubles; with a
sliding window it sees what the window lets it. NVIDIA's Megatron-Bridge summaries count the
same way; PaLM's and llm-foundry's figures count attention in full (``causal=False``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FlopsShape:
    """What a decoder's FLOPs depend on.

    ``num_params`` excludes the input embedding and counts the output head once (of a mixture of
    experts: the parameters that are active for a token); ``attention_width`` is heads * head_dim,
    in query heads; ``sliding_window`` is the number of keys a query may see, or None.
    """

    num_params: int
    num_layers: int
    attention_width: int
    seq_len: int
    causal: bool = True
    sliding_window: int | None = None


def mean_keys(seq_len: int, causal: bool = True, sliding_window: int | None = None) -> float:
    """Keys that a query attends to on average: s, s / 2 when causal, less with a window."""
    if not causal:
        return float(min(seq_len, sliding_window or seq_len))
    window = min(seq_len, sliding_window or seq_len)
    return window - window * window / (2 * seq_len)


def attention_flops(num_layers: int, attention_width: int, num_keys: float) -> float:
    """Forward FLOPs of a query token's scores and weighted sum over ``num_keys``, all layers."""
    return 4.0 * num_layers * attention_width * num_keys


def forward_flops_per_token(shape: FlopsShape) -> float:
    """Forward pass: 2 N + 2 L w s (causal)."""
    keys = mean_keys(shape.seq_len, shape.causal, shape.sliding_window)
    attention = attention_flops(shape.num_layers, shape.attention_width, keys)
    return 2.0 * shape.num_params + attention


def training_flops_per_token(shape: FlopsShape) -> float:
    """Forward and backward pass: 6 N + 6 L w s (causal)."""
    return 3.0 * forward_flops_per_token(shape)

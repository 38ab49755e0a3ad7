"""The plain numbers that every formula takes: a model, the work of one step, one rank's place."""

from __future__ import annotations

import dataclasses
from typing import Literal

from shardwise.errors import ConfigError

Recompute = Literal["none", "selective", "full"]


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What is trained in all blocks; all else stands still.

    Low-rank updates of linear layers: ``layers`` by last name (q, k, v, o, gate, up, down).
    ``magnitudes``: a number an output more. ``subtracted``: a frozen copy of both factors beside
    them. Or networks of two products with ``bottleneck`` features between, so many ``per_block``,
    cut by tensor parallelism or whole. ``quantised``: how the linear layers of the blocks are kept.
    """

    rank: int = 0
    layers: frozenset[str] = frozenset()
    magnitudes: bool = False
    subtracted: bool = False
    bottleneck: int = 0
    per_block: int = 0
    cut: bool = False
    quantised: Literal["nf4", "int8"] | None = None


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A decoder; biases, under 0.1 % of any model of use, are left out.

    ``gated``, ``norms``, ``parallel``, ``qk_norm`` and soft caps: as the model's spec has them.
    ``centred``: its norms are PyTorch's layer norms. ``adapted``: None, and everything is trained.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn_size: int
    vocab_size: int
    tied: bool = True
    adapted: Adapted | None = None
    gated: bool = True
    centred: bool = False
    norms: Literal["before", "around", "after", "shared"] = "before"
    parallel: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    soft_capped_scores: bool = False
    soft_capped_logits: bool = False

    @property
    def norms_per_block(self) -> int:
        """Those of the residual stream's width."""
        return {"around": 4, "shared": 1}.get(self.norms, 2)


@dataclasses.dataclass(frozen=True)
class Work:
    """One optimizer step of one rank. Bytes are those of an element."""

    seq_len: int
    micro_batch: int  # sequences
    micro_batches: int = 1
    compute_bytes: int = 2
    master_bytes: int = 4
    recompute: Recompute = "none"
    wide_logits: bool = False  # fp32 ones, whatever the activations are
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def wide_bytes(self) -> int:
        """What norms and softmax compute in: fp32, or fp64 for fp64."""
        return max(4, self.compute_bytes)


@dataclasses.dataclass(frozen=True)
class Part:
    """A pipeline stage that a rank holds; without pipeline, the one that is everything."""

    layers: int
    first: bool = True  # has the embedding
    last: bool = True  # has the norm, the head and the loss
    in_flight: int = 1  # micro-batches whose activations are held at once, at the worst moment
    together: int = 1  # the same when the rank's parts together hold the most
    last_messages: int = 0  # of `Place.messages`, those held during its last backward pass


@dataclasses.dataclass(frozen=True)
class Place:
    """A layout as one rank sees it. Raises ConfigError for numbers that no layout has."""

    parts: tuple[Part, ...]
    dp: int = 1
    shard: int = 1  # data ranks of a shard group
    zero: int = 1
    tp: int = 1
    sp: bool = False
    pp: int = 1
    cp: int = 1
    cp_kind: Literal["ring", "ulysses"] = "ring"
    messages: int = 0  # activations and gradients between pipeline stages, held at once
    # Micro-batches of each part that wait for the weights' half of a backward pass: every case.
    halves: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        sizes = (self.dp, self.shard, self.tp, self.pp, self.cp)
        if min(sizes) < 1 or self.zero not in range(4) or not self.parts or self.dp % self.shard:
            raise ConfigError(f"memory: no layout has these numbers: {self}")

    @property
    def alone(self) -> bool:
        """Whether nobody else computes with this rank's weights (`Mesh.alone`)."""
        return self.dp * self.cp == 1

    @property
    def splits_backward(self) -> bool:
        """Whether products for weights' gradients wait for a half of their own."""
        return any(map(any, self.halves))

    @property
    def holders(self) -> int:
        """Ranks that share one copy of a parameter; context ranks are data ranks to ZeRO."""
        return self.shard * self.cp if self.zero else 1

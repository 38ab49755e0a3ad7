"""What a part of a model is called with: a micro-batch as this rank's layout cuts it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.data.batch import MicroBatch, indices
from shardwise.losses.contract import is_marked
from shardwise.models.common.config import DecoderConfig
from shardwise.ops import rng
from shardwise.ops.attention import PADDING, causal_mask
from shardwise.ops.logits import Logits
from shardwise.parallel.context import ContextMask, gather_tokens, token_index, tokens_multiple
from shardwise.parallel.mesh import Mesh

# Shape suffixes: B sequences, T tokens, t tokens of this context rank, V vocabulary.


class Cut:
    """One micro-batch, padded to what the layout divides, and this rank's share of its tokens.

    It comes from the host, and is on the mesh's device from here on. Losses never see padding or
    cuts: `logits` maps the model's output back to the micro-batch. ``least``: tokens to pad to,
    whatever the layout. ``reader``: what will read the logits, if the model can leave some out.
    """

    def __init__(
        self,
        batch: MicroBatch,
        mesh: Mesh,
        model: DecoderConfig,
        least: int = 0,
        reader: Callable[..., Any] | None = None,
    ) -> None:
        self.host, self.batch = batch, batch.to(mesh.device)
        self.mesh, self.model = mesh, model
        self.num_tokens = batch.input_ids_BT.shape[1]
        multiple = tokens_multiple(mesh.layout)
        self.padded = -(-max(self.num_tokens, least) // multiple) * multiple
        self.index_t = self._index(mesh.device)
        # Counted on the host: the device would have to be waited for.
        self.valid_N = self.batch.valid()
        host_index_t = self._index(batch.loss_mask_BT.device)
        if host_index_t is not None:
            valid_N = indices(self.pad(batch.loss_mask_BT)[:, host_index_t])
            self.valid_N = valid_N.to(mesh.device, non_blocking=True)
        # Which tokens the head is applied to; None: all, without a copy. A scalar's costs nothing.
        num_own = batch.num_rows * self.padded // mesh.layout.cp
        selects = reader is not None and is_marked(reader) and model.head != "scalar"
        self.read_N = self.valid_N if selects and len(self.valid_N) < num_own else None

    def _index(self, device: torch.device) -> Tensor | None:
        """Which of the padded tokens this rank computes; None: all, and there is no padding."""
        layout = self.mesh.layout
        if layout.cp > 1:
            place = (layout.cp, self.mesh.place["cp"], layout.cp_kind)
            return token_index(self.padded, *place, device)
        return None if self.padded == self.num_tokens else torch.arange(self.padded, device=device)

    def pad(self, x_BT: Tensor, value: int = 0) -> Tensor:
        """Up to the padded length."""
        if self.padded == self.num_tokens:
            return x_BT
        return F.pad(x_BT, (0, self.padded - self.num_tokens), value=value)

    def own(self, x_BT: Tensor) -> Tensor:
        """This rank's tokens of a tensor of the micro-batch's."""
        x_BT = self.pad(x_BT)
        return x_BT if self.index_t is None else x_BT[:, self.index_t]

    def activations(self, dtype: torch.dtype) -> Tensor:
        """Memory for what two pipeline stages exchange."""
        layout = self.mesh.layout
        rows, tokens = self.batch.input_ids_BT.shape[0], self.padded // layout.cp
        if layout.sp:
            tokens //= layout.tp
        shape = (rows, tokens, self.model.hidden_size)
        return torch.empty(shape, dtype=dtype, device=self.mesh.device)

    def arguments(
        self, seed: int | None, step: int, stage: str, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Keyword arguments of a model with activations of ``dtype``; a seed turns dropout on."""
        batch = self.batch
        segments_BT = batch.segment_ids_BT
        arguments: dict[str, Any] = {
            "input_ids_BT": self.own(batch.input_ids_BT),
            "position_ids_BT": self.own(batch.position_ids_BT),
        }
        if self.read_N is not None:
            arguments["read_N"] = self.read_N
        if segments_BT is not None:
            segments_BT = self.pad(segments_BT, PADDING)
        if self.mesh.layout.cp > 1:
            assert self.index_t is not None
            positions_BT = self.pad(batch.position_ids_BT)
            arguments["masks"] = functools.partial(
                ContextMask, self.index_t, segments_BT, positions_BT
            )
        else:
            arguments["segment_ids_BT"] = segments_BT
            if segments_BT is not None:
                assert self.host.segment_ids_BT is not None
                host_BT = self.pad(self.host.segment_ids_BT, PADDING)
                positions_BT = arguments["position_ids_BT"]
                arguments["masks"] = functools.partial(
                    causal_mask, positions_BT, dtype, segments_BT, host_segment_ids_BT=host_BT
                )
        if seed is not None:
            index_t = self.index_t
            if index_t is None:
                index_t = torch.arange(self.padded, device=self.mesh.device)
            arguments["rng_keys_BT"] = rng.token_keys(
                seed, step, stage, batch.sample_ids_B, index_t
            )
        return arguments

    def logits(self, local: Tensor) -> Tensor | Logits:
        """The model's output as losses take it."""
        layout, groups = self.mesh.layout, self.mesh.groups
        if layout.tp == 1 and self.index_t is None and self.read_N is None:
            return local
        size = self.model.head_size
        words = -(-size // layout.tp)
        return Logits(
            local,
            offset=min(words * self.mesh.place["tp"], size),
            vocab_group=groups["tp"] if layout.tp > 1 else None,
            index_t=self.index_t,
            padded=self.padded,
            num_tokens=self.num_tokens,
            gather=self._gather if layout.cp > 1 else None,
            valid_N=self.valid_N,
            num_rows=self.batch.num_rows,
        )

    def _gather(self, x_Bt: Tensor) -> Tensor:
        return gather_tokens(x_Bt, 1, self.mesh.groups["cp"], self.mesh.layout.cp_kind)

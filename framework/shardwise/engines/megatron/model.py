"""A `GPTModel` of megatron-core for each pipeline stage of a rank, from our model configs.

Its linear layers, embeddings and blocks are Megatron's. Three parts are put into its spec: the
attention core, since Megatron's knows neither the positions nor the branches of packed rows; the
norms, where Transformer Engine has none, since those of PyTorch may not stand in a cut sequence;
and the head of one number, which Megatron does not have.

Groups are handed over, not set up globally: several models with layouts of their own may live in
one process.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import megatron.core
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from shardwise.engines.inputs import Cut
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.errors import ConfigError
from shardwise.models.common.blocks import RMSNorm
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.spec import LayerSpec
from shardwise.ops.attention import attention, causal_mask
from shardwise.ops.rope import rotate, tables
from shardwise.ops.rope_scaling import RopeSpec
from shardwise.parallel.context import ContextAttention
from shardwise.parallel.full_tensor import chunk_size
from shardwise.parallel.layout import Layout
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.pipeline import chunks_of, split_model
from shardwise.precision.policy import Precision

# Shape suffixes: B sequences, T tokens, t tokens of this rank, H query heads, G key/value heads,
# K head width, D model width, d its part on this rank. Megatron's order is T, B.


# --- what every layer of a forward pass sees ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seen:
    """Travels through Megatron's model in place of an attention mask."""

    masks: Any  # by sliding window, see `models.common.decoder.Masks`
    ropes: Callable[[RopeSpec], tuple[Tensor, Tensor]]


def seen(cut: Cut, dtype: torch.dtype) -> tuple[dict[str, Tensor], Seen]:
    """The inputs of a micro-batch, and what its layers see."""
    arguments = cut.arguments(None, 0, "", dtype)
    positions_BT = arguments["position_ids_BT"]
    masks = arguments.get("masks") or functools.partial(causal_mask, positions_BT, dtype, None)
    inputs = {"input_ids": arguments["input_ids_BT"], "position_ids": positions_BT}
    ropes = functools.cache(lambda spec: tables(positions_BT, spec, dtype))
    return inputs, Seen(functools.cache(masks), ropes)


class Core(nn.Module):
    """Attention by `ops.attention`; ``layers`` and ``mesh`` are set on a class of its own.

    Positions are rotated here, not by Megatron, which counts them by place in the row.
    """

    layers: tuple[LayerSpec, ...]
    mesh: Mesh

    def __init__(self, config: Any, layer_number: int, *_: Any, **__: Any) -> None:
        super().__init__()
        self.layer = self.layers[layer_number - 1]
        self.attend: Any = attention
        layout = self.mesh.layout
        if layout.cp > 1:
            self.attend = ContextAttention(self.mesh.groups["cp"], layout.cp_kind)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Seen, **_: Any
    ) -> Tensor:
        """(T, B, H, K) and (T, B, G, K) to (T, B, H * K)."""
        q_BHTK, k_BGTK, v_BGTK = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.layer.rope is not None:
            rope = attention_mask.ropes(self.layer.rope)
            pairs = self.layer.rope.interleaved
            q_BHTK, k_BGTK = (rotate(x, *rope, pairs) for x in (q_BHTK, k_BGTK))
        out_BHTK = self.attend(q_BHTK, k_BGTK, v_BGTK, attention_mask.masks(self.layer.window))
        return out_BHTK.permute(2, 0, 1, 3).flatten(2)  # type: ignore[no-any-return]


class Norm:
    """Makes a norm that Megatron knows to be fed with parts of a sequence.

    Without the mark it takes its gradient for whole: silently, each tp rank's is then a part.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float, **_: Any) -> Any:
        rms = config.normalization == "RMSNorm"
        norm: nn.Module = RMSNorm(hidden_size, eps) if rms else nn.LayerNorm(hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class ScalarHead(nn.Module):
    """One number a token: each tp rank has a part of the features, and gives a part of the sum.

    In place of Megatron's output layer, whose width it cuts; see `parallel.tensor.ScalarLinear`.
    """

    def __init__(self, config: TransformerConfig, mesh: Mesh) -> None:
        super().__init__()
        size, rank, width = mesh.layout.tp, mesh.place["tp"], config.hidden_size
        self.group, self.sequence = mesh.groups["tp"], config.sequence_parallel
        self.start, self.own = rank * -(-width // size), chunk_size(width, size, rank)
        self.weight = nn.Parameter(torch.empty(1, self.own, dtype=config.params_dtype))

    def forward(self, x_TBD: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """(T, B, 1), and no bias."""
        if self.sequence:
            x_TBD = mappings.gather_from_sequence_parallel_region(x_TBD, group=self.group)
        else:
            x_TBD = mappings.copy_to_tensor_model_parallel_region(x_TBD, group=self.group)
        weight = self.weight if weight is None else weight
        return F.linear(x_TBD.narrow(-1, self.start, self.own), weight), None


def _widen(head: nn.Module) -> None:
    """fp32 logits of 16-bit operands."""
    plain: Any = head.forward

    def forward(x_TBD: Tensor, weight: Tensor | None = None, **options: Any) -> Any:
        weight = head.weight if weight is None else weight  # type: ignore[assignment]
        return plain(x_TBD.float(), weight=weight.float(), **options)  # type: ignore[union-attr]

    head.forward = forward


# --- configs --------------------------------------------------------------------------------------


_ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class Split(PipelineParallelLayerLayout):  # type: ignore[misc]
    """Our cut of the model, asked for by a rank that no global state knows.

    Megatron's own reads rank and number of virtual stages off `parallel_state`; where nobody set
    that up, every virtual stage gets the first one's layers.
    """

    def __init__(self, parts: list[range], num_layers: int, pp: int, rank: int) -> None:
        stages = [
            ["embedding"] * (0 in part)
            + ["decoder"] * len(part)
            + ["loss"] * (num_layers - 1 in part)
            for part in parts
        ]
        super().__init__(stages, pp)
        self.parts, self.pp, self.rank = parts, pp, rank

    def _part(self, vp_stage: int | None, rank: int | None) -> range:
        return self.parts[(vp_stage or 0) * self.pp + (self.rank if rank is None else rank)]

    def get_num_layers_to_build(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Of a pipeline stage."""
        return len(self._part(vp_stage, pp_rank))

    def get_layer_offset(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """The number of its first layer."""
        return self._part(vp_stage, pp_rank).start


def groups_of(mesh: Mesh) -> ProcessGroupCollection:
    """Our groups by Megatron's names."""
    groups, layout = mesh.groups, mesh.layout
    found = ProcessGroupCollection()
    found.tp, found.pp, found.cp, found.dp = (groups[x] for x in ("tp", "pp", "cp", "dp"))
    # To gradients, context-parallel peers are data ranks.
    found.dp_cp = found.dp
    if layout.cp > 1:
        found.dp_cp = groups["shard" if layout.zero else "replicate"]
    found.expt_dp, found.ep = found.dp_cp, groups["cp"]  # no model has experts
    found.embd = groups.get("ends")  # who holds a tied embedding, or its copy
    found.pos_embd = None
    return found


def transformer_config(
    model: DecoderConfig, mesh: Mesh, precision: Precision, **options: Any
) -> TransformerConfig:
    """Megatron's config: nothing is fused that changes what is computed."""
    layout, dtype, on_cpu = mesh.layout, precision.compute, mesh.device.type == "cpu"
    layer, activation = model.spec.layer, _ACTIVATIONS[model.spec.layer.activation]
    pipeline: dict[str, Any] = {}
    if layout.pp > 1:
        parts, interleaved = split_model(model, layout.num_chunks), layout.virtual > 1
        pipeline = {
            "pipeline_model_parallel_size": layout.pp,
            "pipeline_dtype": dtype,
            "variable_seq_lengths": not interleaved,  # micro-batches differ
            "moe_token_dispatcher_type": "alltoall",  # asked for by that, without an expert
            # Between two ranks, two messages of a batch may be taken for each other.
            "batch_p2p_comm": not interleaved,
            "overlap_p2p_comm": interleaved,
            "batch_p2p_sync": not on_cpu,
            "pipeline_model_parallel_layout": Split(
                parts, model.num_layers, layout.pp, mesh.place["pp"]
            ),
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=layer.kv_heads,
        kv_channels=layer.head_width,
        ffn_hidden_size=layer.ffn_size,
        normalization="RMSNorm" if layer.norm.kind == "rms" else "LayerNorm",
        layernorm_epsilon=layer.norm.eps,
        add_bias_linear=layer.mlp_bias,  # of all layers, see `refusals`
        add_qkv_bias=layer.qkv_bias and not layer.mlp_bias,
        qk_layernorm=layer.qk_norm is not None,
        gated_linear_unit=layer.gated,
        activation_func=activation,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        context_parallel_size=layout.cp,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,  # weights are ours
        calculate_per_token_loss=True,  # sums, which nobody divides
        **pipeline,
        **options,
    )


def uses_te(config: MegatronConfig, device: torch.device) -> bool:
    """Whether Transformer Engine's layers compute. Raises ConfigError where they cannot."""
    can = device.type == "cuda" and find_spec("transformer_engine") is not None
    if config.layers == "te" and not can:
        raise ConfigError(
            "engine.layers: te needs a GPU and transformer-engine; pip install 'shardwise[gpu]', "
            "or write layers: local"
        )
    return can and config.layers != "local"


def block_spec(
    model: DecoderConfig, config: TransformerConfig, mesh: Mesh, num_layers: int, te: bool
) -> TransformerBlockSubmodules:
    """Megatron's layers with the parts that are ours."""
    core = type("Core", (Core,), {"layers": model.spec.layers, "mesh": mesh})
    qk_norm, norm = config.qk_layernorm, config.normalization
    if te:
        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        last: Any = gpt_layer_specs.TENorm
    else:
        layer = gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization=norm)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = last = Norm
        if qk_norm:
            inside = layer.submodules.self_attention.submodules
            inside.q_layernorm = inside.k_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = core
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=last)


def check_release() -> None:
    """Raise ConfigError for a megatron-core whose parts cannot be handed their process groups."""
    takes = inspect.signature(schedules.forward_backward_no_pipelining).parameters
    if "p2p_communicator" not in takes or "pg_collection" not in takes:
        raise ConfigError(
            "engine.kind: megatron needs megatron-core 0.16 or newer, and "
            f"{megatron.core.__version__} is installed; pip install -U 'shardwise[megatron]', or "
            "write kind: native"
        )


# --- the model ------------------------------------------------------------------------------------


def padded_vocabulary(model: DecoderConfig, layout: Layout) -> int:
    """Rows that tp ranks share evenly; those behind the vocabulary stay zero."""
    return -(-model.vocab_size // layout.tp) * layout.tp


def build_parts(
    model: DecoderConfig,
    config: TransformerConfig,
    mesh: Mesh,
    *,
    te: bool,
    wide_logits: bool,
) -> dict[int, GPTModel]:
    """By number of pipeline stage, those that this rank holds; every weight is zero."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # asked for under sequence parallelism
        parallel_state._set_global_memory_buffer()
    layout, groups, found = mesh.layout, groups_of(mesh), {}
    learned = "none" if model.spec.learned_positions is None else "learned_absolute"
    splits = split_model(model, layout.num_chunks)
    for i, number in enumerate(chunks_of(layout, mesh.place["pp"])):
        with torch.device(mesh.device):
            part = GPTModel(
                config=config,
                transformer_layer_spec=block_spec(model, config, mesh, len(splits[number]), te),
                vocab_size=padded_vocabulary(model, layout),
                max_sequence_length=model.max_seq_len,
                pre_process=number == 0,
                post_process=number == layout.num_chunks - 1,
                parallel_output=True,
                share_embeddings_and_output_weights=model.tie_embeddings,
                position_embedding_type=learned,
                pg_collection=groups,
                vp_stage=i if layout.virtual > 1 else None,
            )
            if part.post_process and model.head == "scalar":
                part.output_layer = ScalarHead(config, mesh)
        part.to(config.params_dtype)
        if part.post_process and wide_logits:
            _widen(part.output_layer)
        for parameter in part.parameters():
            parameter.data.zero_()
        found[number] = part
    return found

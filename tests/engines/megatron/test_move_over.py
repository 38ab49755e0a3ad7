"""From a run of Megatron-core's own to one of ours, as docs/engines.md says: next losses agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shardwise.data.tokenizer import ByteTokenizer
from shardwise.models import registry
from tests.support import toy
from tests.support.megatron_files import written_here
from tests.support.moving import (
    BATCH,
    BETAS,
    CLIP,
    DECAY,
    LENGTH,
    RATE,
    SAVED,
    STEPS,
    TEXT,
    assert_goes_on,
    batches,
    recipe,
)
from tests.support.pool import RankPool

pytest.importorskip("megatron.core")

# Filled up as Megatron-LM does; what fills it counts in the softmax, and so are words here.
WORDS = -(-ByteTokenizer().vocab_size // 128) * 128
MODEL = toy.llama(vocab_size=WORDS, max_seq_len=64, tie_embeddings=False)


def its_model(tp: int) -> Any:
    """As Megatron-LM builds Llama: its own layers throughout."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=MODEL.num_layers,
        hidden_size=MODEL.hidden_size,
        num_attention_heads=MODEL.num_heads,
        num_query_groups=MODEL.num_kv_heads,
        ffn_hidden_size=MODEL.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=MODEL.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=WORDS,
        max_sequence_length=MODEL.max_seq_len,
        position_embedding_type="rope",
        rotary_base=int(MODEL.rope_base),
        share_embeddings_and_output_weights=False,
    )


def theirs(tp: int, data: list[tuple[Tensor, Tensor]], out: str) -> list[float]:
    """A training loop as Megatron-LM's: its buffers, schedule, optimizer and checkpoint."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import (
        OptimizerConfig,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from shardwise.engines.megatron import cpu

    sharded, losses = tp == 1, []
    parallel_state.destroy_global_memory_buffer()  # an engine of ours may have made one here
    parallel_state.initialize_model_parallel(tp)
    ranks = parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_data_parallel_rank() * BATCH // ranks
    mine = slice(first, first + BATCH // ranks)
    torch.manual_seed(7)
    with cpu.updating(torch.float32), written_here():
        net = its_model(tp)
        buffers = DistributedDataParallelConfig(
            use_distributed_optimizer=sharded, bucket_size=40_000_000
        )
        net = DistributedDataParallel(net.config, buffers, net)
        net.config.finalize_model_grads_func = finalize_model_grads
        settings = OptimizerConfig(
            optimizer="adam",
            lr=RATE,
            weight_decay=DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_eps=1e-8,
            clip_grad=CLIP,
            use_distributed_optimizer=sharded,
        )
        optimizer = get_megatron_optimizer(settings, [net], get_standard_config_overrides(settings))
        for group in optimizer.param_groups:  # as its scheduler does at every step
            group["weight_decay"] = DECAY * group["wd_mult"]
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
        positions = torch.arange(LENGTH).expand(BATCH // ranks, -1)

        def forward(rows: Any, model: Any) -> Any:
            tokens, targets = next(rows)
            found = model(tokens[mine], positions, mask, labels=targets[mine])
            return found, lambda losses_BT: (losses_BT.mean(), {"loss": losses_BT.detach().mean()})

        for step in range(STEPS):
            if step == SAVED:
                save(dist_checkpointing, net, optimizer, step, Path(out))
            net.zero_grad_buffer()
            optimizer.zero_grad()
            [said] = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(data[step : step + 1]),
                model=[net],
                num_microbatches=1,
                seq_length=LENGTH,
                micro_batch_size=BATCH // ranks,
                forward_only=False,
            )
            assert optimizer.step()[0]
            dist.all_reduce(whole := said["loss"] / dist.get_world_size())
            losses.append(float(whole))
    parallel_state.destroy_model_parallel()
    return losses


def save(dist_checkpointing: Any, net: Any, optimizer: Any, step: int, out: Path) -> None:
    """As Megatron-LM saves, with ``--dist-ckpt-optim-fully-reshardable``."""
    folder = out / f"iter_{step:07d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        (out / "latest_checkpointed_iteration.txt").write_text(str(step))
    dist.barrier()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state = net.module.sharded_state_dict(metadata=metadata)
    state |= {"optimizer": optimizer.sharded_state_dict(state, metadata=metadata)}
    state |= {"iteration": step, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 1], ids=["tp2", "dp2_distributed_optimizer"])
def test_a_run_of_megatrons_goes_on_here(ranks: RankPool, tmp_path: Path, tp: int) -> None:
    (text := tmp_path / "text.txt").write_text(TEXT)
    weights = {n: torch.zeros(p.shape) for n, p in registry.build(MODEL).named_parameters()}
    registry.to_hf(model := tmp_path / "model", MODEL, weights.items())
    ByteTokenizer().save(model)
    data = batches(recipe(tmp_path / "none", model, text), tmp_path / "cache")
    said = ranks.run(theirs, tp, data, str(tmp_path / "run"), world=2)[0]
    assert said[-1] < said[0] - 0.5
    assert_goes_on(ranks, tmp_path, model, text, said)

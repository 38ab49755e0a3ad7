"""From a run of DeepSpeed's own to one of ours, as docs/engines.md says: the next losses agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardwise.data.tokenizer import ByteTokenizer
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from tests.support import toy
from tests.support.moving import (
    BATCH,
    BETAS,
    CLIP,
    DECAY,
    RATE,
    SAVED,
    TEXT,
    assert_goes_on,
    batches,
    recipe,
)
from tests.support.pool import RankPool

pytest.importorskip("deepspeed")


def theirs(model: str, data: list[tuple[torch.Tensor, torch.Tensor]], out: str) -> list[float]:
    """A training loop as one writes it with DeepSpeed and transformers; the losses."""
    from transformers import AutoModelForCausalLM

    from shardwise.engines.deepspeed import library

    deepspeed = library.load("cpu")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in net.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": BATCH // 2,
        "zero_optimization": {"stage": 2},
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)[0]
    rank, losses = dist.get_rank(), []
    for step, (tokens, targets) in enumerate(data):
        if step == SAVED:
            engine.save_checkpoint(out, tag=f"global_step{step}")
        mine = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        logits = engine(tokens[mine]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[mine].flatten())
        engine.backward(loss)
        engine.step()
        whole = loss.detach() / 2
        dist.all_reduce(whole)
        losses.append(float(whole))
    engine.destroy()
    return losses


@pytest.mark.slow
def test_a_run_of_deepspeeds_goes_on_here(ranks: RankPool, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    config = toy.llama(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    init_weights(made := registry.build(config), 0)
    registry.to_hf(model := tmp_path / "model", config, made.named_parameters())
    tokenizer.save(model)
    (text := tmp_path / "text.txt").write_text(TEXT)
    data = batches(recipe(tmp_path / "none", model, text), tmp_path / "cache")
    said = ranks.run(theirs, str(model), data, str(tmp_path / "run"), world=2)[0]
    assert_goes_on(ranks, tmp_path, model, text, said)

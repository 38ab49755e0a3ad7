"""TRL's GRPOTrainer: its own steps, and a replay of stored completions through its internals.

Written against TRL 1.16. It is given its faster settings: no gradient checkpointing, no logging,
fused AdamW, PyTorch's attention. End-of-text is switched off so that every completion has the full
length, as on our side.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from peers.hf_trainer import Turns, be_quiet
from shardwise.data.tokenizer import Tokenizer
from shardwise.models.dense.llama import LlamaConfig as OurConfig

NEVER = -1  # a token id that no model writes


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What a trainer made of stored completions and rewards."""

    prompt_ids: list[list[int]]  # of each completion
    logprobs: Tensor  # [completions, tokens]
    advantages: Tensor  # [completions]
    grad_norm: float


class TrlGrpo:
    """A GRPOTrainer around given weights (a stream under Hugging Face names)."""

    def __init__(
        self,
        config: OurConfig,
        weights: Iterable[tuple[str, Tensor]],
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        *,
        num_completions: int,
        group_size: int,
        length: int,
        lr: float,
        score: Callable[[list[str]], list[float]],
    ) -> None:
        be_quiet()
        self.score = score
        self.group_size = group_size
        self.turn: Callable[[], bool] = lambda: False
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            theirs = AutoTokenizer.from_pretrained(folder, padding_side="left")
            arguments = GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=num_completions,
                num_generations=group_size,
                max_completion_length=length,
                temperature=1.0,
                beta=0.0,
                max_steps=1_000_000,
                learning_rate=lr,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                max_grad_norm=1.0,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
        self.trainer: Any = GRPOTrainer(
            model=_model(config, weights),
            reward_funcs=self._reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": list(prompts)}),
            processing_class=theirs,
            callbacks=[Turns(lambda: self.turn(), 1)],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.eos_token_ids = [NEVER]
        self.trainer.generation_config.eos_token_id = None
        self.trainer.generation_kwargs["eos_token_id"] = None
        self.trainer.model.generation_config.eos_token_id = None

    def _reward(self, completions: list[str], **_: Any) -> list[float]:
        return self.score(completions)

    def replay(
        self, prompts: Sequence[str], completions: list[list[int]], rewards: list[float]
    ) -> Replayed:
        """Stored completions (``group_size`` of each prompt, in order) through scoring and loss."""
        trainer, score, generate = self.trainer, self.score, self.trainer._generate_single_turn
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        trainer._generate_single_turn = lambda *_, **__: (completions, None)
        self.score = lambda texts: rewards
        try:
            rows = [{"prompt": p} for p in prompts for _ in range(self.group_size)]
            batch = trainer._generate_and_score_completions(rows)
        finally:
            trainer._generate_single_turn, self.score = generate, score
        ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1)
        mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), dim=1)
        with torch.no_grad():
            logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, batch["completion_ids"].shape[1]
            )
        trainer.compute_loss(trainer.model, batch).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
        trainer.model.zero_grad(set_to_none=True)
        prompt_ids = [
            row[keep.bool()].tolist()
            for row, keep in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        return Replayed(prompt_ids, logprobs, batch["advantages"], float(norm))

    def train(self, turn: Callable[[], bool]) -> None:
        """Real steps; ``turn`` is called after each and ends the training by False."""
        self.turn = turn
        self.trainer.train()


def _model(config: OurConfig, weights: Iterable[tuple[str, Tensor]]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.ffn_size,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    )
    found = model.load_state_dict({n: t.clone() for n, t in weights}, strict=False)
    # A tied head has no tensor of its own.
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}, found
    return model

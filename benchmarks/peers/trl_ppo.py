"""TRL's PPOTrainer: its own updates, and a replay of stored completions through its internals.

Written against TRL 1.12, the last release with a PPO trainer. It is given its faster settings: no
gradient checkpointing, no logging, fused AdamW, PyTorch's attention, one rollout batch. No token
ends a completion, so that every one has the full length, as on our side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import datasets
import torch
import trl.experimental.ppo.ppo_trainer as internals
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PrinterCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from peers.hf_trainer import Turns, be_quiet
from shardwise.data.tokenizer import Tokenizer
from shardwise.models.dense.llama import LlamaConfig as OurConfig

Weights = Iterable[tuple[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What a trainer made of stored completions, all [completions, tokens] but the norms."""

    prompt_ids: list[list[int]]
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    policy_norm: float
    value_norm: float


class _DoneError(Exception):
    """The replay has seen what it wanted."""


class TrlPpo:
    """A PPOTrainer around given weights (streams under Hugging Face names)."""

    def __init__(
        self,
        config: OurConfig,
        policy: Weights,
        reference: Weights,
        critic: Weights,
        reward: Weights,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        *,
        group_size: int,
        length: int,
        lr: float,
        epochs: int,
        precision: str,
    ) -> None:
        be_quiet()
        # Its `bf16` argument reaches no product: the trainer makes its own Accelerator, which
        # reads what `accelerate launch --mixed_precision` would set.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if precision == "bf16" else "no"
        AcceleratorState._reset_state(reset_partial_state=True)  # another may have been made before
        self.turn: Callable[[], bool] = lambda: False
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            theirs = AutoTokenizer.from_pretrained(folder, padding_side="left")
            arguments = PPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=len(prompts) * group_size,
                gradient_accumulation_steps=1,
                num_mini_batches=1,
                num_ppo_epochs=epochs,
                local_rollout_forward_batch_size=len(prompts) * group_size,
                response_length=length,
                temperature=1.0,
                total_episodes=1_000_000,
                num_sample_generations=0,
                learning_rate=lr,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
        self.pad_id = theirs.pad_token_id
        ids = [theirs(p, add_special_tokens=False)["input_ids"] for p in prompts]
        rows = [row for row in ids for _ in range(group_size)]
        self.trainer: Any = PPOTrainer(
            args=arguments,
            processing_class=theirs,
            model=_fill(LlamaForCausalLM(_config(config, self.pad_id)), policy),
            ref_model=_fill(LlamaForCausalLM(_config(config, self.pad_id)), reference),
            reward_model=_fill(_scorer(config, self.pad_id), reward),
            value_model=_fill(_scorer(config, self.pad_id), critic),
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
            callbacks=[Turns(lambda: self.turn(), 1)],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.log = lambda *_, **__: None

    def replay(self, completions: dict[tuple[int, ...], list[list[int]]]) -> Replayed:
        """Stored completions by prompt, through rollout, advantages and the first gradients."""
        left = {prompt: list(rows) for prompt, rows in completions.items()}
        seen: dict[str, Any] = {}

        def generate(model: Any, queries: Tensor, _: int, pad_id: int, __: Any) -> Any:
            prompts = [tuple(t for t in row.tolist() if t != pad_id) for row in queries]
            seen["prompts"] = prompts
            written = torch.tensor([left[p].pop(0) for p in prompts])
            both = torch.cat((queries, written), dim=1)
            logits = internals.forward(model, both, pad_id).logits
            return both, logits[:, queries.shape[1] - 1 : -1]

        real_pick, real_whiten, real_reward = (
            internals.selective_log_softmax,
            internals.masked_whiten,
            internals.get_reward,
        )

        def pick(logits: Tensor, ids: Tensor) -> Tensor:
            found: Tensor = real_pick(logits, ids)
            seen.setdefault("logprobs", found.detach())
            return found

        def whiten(values: Tensor, mask: Tensor, **options: Any) -> Tensor:
            found: Tensor = real_whiten(values, mask, **options)
            # Their variance is divided by n - 1, ours by n: the one known difference, taken out.
            seen["advantages"] = found * torch.sqrt(mask.sum() / (mask.sum() - 1))
            return seen["advantages"]  # type: ignore[no-any-return]

        def reward(model: Any, both: Tensor, pad_id: int, context: int) -> Any:
            found = real_reward(model, both, pad_id, context)
            seen.setdefault("values", found[0][:, context - 1 : -1].squeeze(-1))
            return found

        def step(*_: Any, **__: Any) -> None:
            wrapped = self.trainer.model
            for name in ("policy", "value_model"):
                grads = [p.grad for p in getattr(wrapped, name).parameters() if p.grad is not None]
                seen[name] = float(torch.nn.utils.get_total_norm(grads))
            raise _DoneError

        with (
            mock.patch.object(internals, "batch_generation", generate),
            mock.patch.object(internals, "selective_log_softmax", pick),
            mock.patch.object(internals, "masked_whiten", whiten),
            mock.patch.object(internals, "get_reward", reward),
            mock.patch.object(self.trainer.optimizer, "step", step),
            contextlib.suppress(_DoneError),
        ):
            self.trainer.train()
        self.trainer.optimizer.zero_grad()
        return Replayed(
            [list(p) for p in seen["prompts"]],
            seen["logprobs"],
            seen["values"],
            seen["advantages"],
            seen["policy"],
            seen["value_model"] / self.trainer.args.vf_coef,
        )

    def train(self, turn: Callable[[], bool]) -> None:
        """Real updates; ``turn`` is called after each and ends the training by False."""

        def turn_or_end() -> bool:
            if not turn():
                raise _EndError  # this trainer does not look at `should_training_stop`
            return True

        self.turn = turn_or_end
        with contextlib.suppress(_EndError):
            self.trainer.train()


class _EndError(Exception):
    """Enough turns."""


def _config(config: OurConfig, pad_id: int) -> LlamaConfig:
    return LlamaConfig(
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
        pad_token_id=pad_id,
        attn_implementation="sdpa",
    )


def _scorer(config: OurConfig, pad_id: int) -> LlamaForSequenceClassification:
    settings = _config(config, pad_id)
    settings.num_labels, settings.tie_word_embeddings = 1, False
    return LlamaForSequenceClassification(settings)


def _fill(model: Any, weights: Weights) -> Any:
    found = model.load_state_dict({n: t.clone() for n, t in weights}, strict=False)
    # A tied head has no tensor of its own.
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}, found
    return model

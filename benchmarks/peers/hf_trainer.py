"""The Hugging Face Trainer, on a Llama of the same shape, with torch_compile, in bf16 or fp32."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peers.handwritten import Shape


class Turns(TrainerCallback):
    """Calls ``turn()`` after every ``steps`` steps; all that happens between is the Trainer's."""

    def __init__(self, turn: Callable[[], bool], steps: int) -> None:
        self.turn, self.steps = turn, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            control.should_training_stop = not self.turn()


def be_quiet() -> None:
    """No progress notes and no advice from transformers."""
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def train(
    shape: Shape,
    rows: torch.Tensor,
    *,
    compile: bool,
    bf16: bool,
    steps_per_turn: int,
    turn: Callable[[], bool],
) -> None:
    """Train on ``rows`` [N, T] until ``turn``, called after ``steps_per_turn`` steps, is False."""
    be_quiet()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            intermediate_size=shape.ffn_size,
            max_position_embeddings=shape.seq_len,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=bf16,
            torch_compile=compile,
            per_device_train_batch_size=shape.batch,
            max_steps=1_000_000,
            learning_rate=3e-4,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(
            model,
            arguments,
            train_dataset=dataset,  # type: ignore[arg-type]
            data_collator=transformers.default_data_collator,
            callbacks=[Turns(turn, steps_per_turn)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

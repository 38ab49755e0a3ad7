"""TRL's SFT, DPO and reward trainers, with PEFT's LoRA and bitsandbytes' NF4.

Written against TRL 1.16 and PEFT 0.21. They get token ids, one batch again and again, and their
faster settings: no gradient checkpointing, no logging, fused AdamW, PyTorch's attention; in bf16
frozen weights are loaded in it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as _library  # noqa: F401  (what is loaded later would count as the trainer's)
import datasets
import numpy as np
import peft
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from peers.hf_trainer import Turns, be_quiet
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.models.dense.llama import LlamaConfig as OurConfig

Start = Mapping[
    str, NDArray[np.float32]
]  # no tensors: those a pipe shares, and they end with their sender

REPEATS = 200  # of the batch: an epoch's beginning is no part of a step


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the trainer is run: rows packed and not padded; the model compiled."""

    packed: bool = False
    compile: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, on which batch; the same for both sides.

    ``rows``: (prompt, answer, worse answer) as token ids. ``start``: initial values that no folder
    holds: an adapter under PEFT's names, or ``score.weight``. ``rank``: of LoRA, on all linear
    layers of the blocks, alpha twice as large; 0: everything is trained.
    """

    kind: str  # sft, dpo, reward
    folder: Path
    rows: list[tuple[list[int], list[int], list[int]]]
    rank: int
    nf4: bool
    lr: float
    max_length: int
    beta: float
    start: Start


class TrlTuning:
    """A trainer of TRL's on one batch; ``precision``: bf16 or fp32."""

    def __init__(self, task: Task, precision: str, setting: Setting = Setting()) -> None:
        be_quiet()
        datasets.disable_progress_bars()
        self.turn: Callable[[], bool] = lambda: False
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.trainer: Any = _trainer(task, precision, setting)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(Turns(lambda: self.turn(), 1))
        self._repeat_batch()
        self._start(task.start, precision)
        self._watch()

    def _repeat_batch(self) -> None:
        """All rows are one batch, and the epoch is many of it."""
        trainer, rows = self.trainer, self.trainer.train_dataset
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = len(rows)
        trainer.train_dataset = datasets.concatenate_datasets([rows] * REPEATS)
        trainer._get_train_sampler = lambda *_, **__: SequentialSampler(trainer.train_dataset)

    def _start(self, given: Start, precision: str) -> None:
        model = self.trainer.model
        start = {name: torch.tensor(value) for name, value in given.items()}
        if isinstance(model, peft.PeftModel):
            if precision == "fp32":  # the trainer rounds adapters of quantised models to bf16
                for p in model.parameters():
                    p.data = p.data.float() if p.requires_grad else p.data
            missed = peft.set_peft_model_state_dict(model, start).unexpected_keys
            assert not missed, missed
        elif start:
            model.score.weight.data.copy_(start["score.weight"])

    def _watch(self) -> None:
        """Keep losses and gradient norms of the steps."""
        trainer = self.trainer
        step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            self.losses.append(loss := step(*args, **kwargs))
            return loss  # type: ignore[no-any-return]

        def clip_grad_norm(*args: Any, **kwargs: Any) -> Tensor:
            self.norms.append(norm := clip(*args, **kwargs))
            return norm  # type: ignore[no-any-return]

        trainer.training_step = training_step
        trainer.accelerator.clip_grad_norm_ = clip_grad_norm

    def train(self, turn: Callable[[], bool]) -> None:
        """Real steps; ``turn`` is called after each and ends the training by False."""
        self.turn = turn
        self.trainer.train()

    def replay(self, steps: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of the first steps."""
        self.train(lambda: len(self.norms) < steps)
        return [(float(a), float(b)) for a, b in zip(self.losses, self.norms, strict=True)]


class _Tokenised(DPOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """Rows are token ids already, which the other two trainers see by themselves."""
        return dataset


def _trainer(task: Task, precision: str, setting: Setting) -> Any:
    adapted = None
    if task.rank:
        adapted = peft.LoraConfig(
            r=task.rank,
            lora_alpha=2 * task.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    trainer, config, said = {
        "sft": (SFTTrainer, SFTConfig, {"packing": setting.packed, "shuffle_dataset": False}),
        "dpo": (_Tokenised, DPOConfig, {"beta": task.beta}),
        "reward": (RewardTrainer, RewardConfig, {}),
    }[task.kind]
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder,
            use_cpu=True,
            bf16=precision == "bf16",
            torch_compile=setting.compile,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(task.rows),
            max_length=task.max_length,
            max_steps=1_000_000,
            learning_rate=task.lr,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **said,
        )
        return trainer(
            model=_model(task, precision),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(_rows(task)),
            processing_class=AutoTokenizer.from_pretrained(task.folder),
            peft_config=adapted,
        )


def _model(task: Task, precision: str) -> Any:
    frozen = task.rank > 0
    options: dict[str, Any] = {
        # Weights that are trained are fp32, and products take bf16 copies (autocast).
        "dtype": torch.bfloat16 if frozen and precision == "bf16" else torch.float32,
        "attn_implementation": "sdpa",
    }
    if task.nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
        options["device_map"] = {"": "cpu"}
    if task.kind == "reward":
        return AutoModelForSequenceClassification.from_pretrained(
            task.folder, num_labels=1, **options
        )
    return AutoModelForCausalLM.from_pretrained(task.folder, **options)


def _rows(task: Task) -> list[dict[str, list[int]]]:
    """The batch in the columns that each trainer takes as tokenised."""
    if task.kind == "sft":
        return [{"input_ids": [*p, *a], "labels": [-100] * len(p) + a} for p, a, _ in task.rows]
    if task.kind == "dpo":
        return [{"prompt_ids": p, "chosen_ids": a, "rejected_ids": w} for p, a, w in task.rows]
    return [{"chosen_ids": [*p, *a], "rejected_ids": [*p, *w]} for p, a, w in task.rows]


def write_llama(folder: Path, config: OurConfig, seed: int = 0) -> None:
    """A model with random weights as a Hugging Face folder, its tokens bytes."""
    torch.manual_seed(seed)
    tokenizer = ByteTokenizer()
    tokenizer.save(folder)
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
            pad_token_id=tokenizer.pad_id,
        )
    )
    model.save_pretrained(folder)

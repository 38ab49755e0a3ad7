"""What the field takes for each stage: rates, epochs, batches, schedules, each with its source.

A rate is that of all weights of a model of some width. It falls with the width as in Schulman et
al. 2025 ("LoRA Without Regret", thinkingmachines.ai/blog/lora, and the cookbook beside it, for
Llamas: (2000 / hidden_size)^0.781), and is ten times as high for LoRA (there, too).
"""

from __future__ import annotations

import dataclasses
import math

from shardwise.config import yaml12

WIDTH_POWER = 0.781
LORA_FACTOR = 10.0
SCHULMAN = "Schulman et al. 2025"
STEPS = 100  # fewer say little of a schedule; a small batch is no disadvantage (the same source)
FEWEST = 4  # rows of a batch, all the same


@dataclasses.dataclass(frozen=True)
class Usual:
    """``rate`` at ``width``, of ``rate_source`` if not of ``source``.

    ``batch`` in examples (pre-training: tokens; grpo: prompts); ``warmup`` in shares of the steps.
    """

    source: str
    rate: float
    width: int
    batch: int
    schedule: str
    warmup: float = 0.0
    min_ratio: float = 0.0
    weight_decay: float = 0.0
    epochs: int = 1
    rate_source: str = ""


USUAL = {
    # Section 2: a model goes on with data of one kind.
    "pretrain": Usual(
        "Code Llama - Python, Rozière et al. 2023",
        1e-4, 4096, 1 << 19, "cosine", warmup=0.01, min_ratio=0.1, weight_decay=0.1,
    ),
    # Of SFT: 2 epochs, 128 examples, linear, 3 % of warm-up.
    "sft": Usual(
        "Tülu 3, Lambert et al. 2024",
        5e-5, 2000, 128, "linear", warmup=0.03, epochs=2, rate_source=SCHULMAN,
    ),
    # Of DPO of 8B: 5e-7, 1 epoch, 128 examples, linear, 10 % of warm-up.
    "dpo": Usual("Tülu 3, Lambert et al. 2024", 5e-7, 4096, 128, "linear", warmup=0.1),
    # Section 3.2.2: 1e-5, 1 epoch, 512 pairs, cosine to 10 %, 3 % of warm-up.
    "reward": Usual(
        "Llama 2, Touvron et al. 2023", 1e-5, 4096, 512, "cosine", warmup=0.03, min_ratio=0.1
    ),
    # Section 4.2: 1e-6 for 7B, 1,024 completions of 16 prompts.
    "grpo": Usual("DeepSeekMath, Shao et al. 2024", 1e-6, 4096, 16, "constant"),
}  # fmt: skip

SAMPLES = 8
SAMPLES_WHY = "size of a group: TRL 1.16's default (DeepSeekMath: 64)"
NEW_TOKENS = {"cpu": 128, "cuda": 512}
NEW_TOKENS_WHY = "a completion at most; TRL 1.16's default is 512, which takes long on a CPU"
ADAPTER_WHY = f"all linear layers, alpha 32 ({SCHULMAN}); rank 16: TRL's default"
QUANTISED_WHY = "the base in 4 bits (QLoRA, Dettmers et al. 2023)"
BETA_WHY = "Rafailov et al. 2023, and TRL's default"


def rate(usual: Usual, width: int, adapts: bool) -> tuple[float, str]:
    """Peak learning rate for a model of hidden size ``width``, to one digit, and why."""
    found = usual.rate * (usual.width / width) ** WIDTH_POWER
    law = "" if usual.rate_source == SCHULMAN else f", falling with the width ({SCHULMAN})"
    why = (
        f"{found:.1e} for width {width}: {yaml12.inline(usual.rate)} at {usual.width} "
        f"({usual.rate_source or usual.source}){law}"
    )
    if adapts:
        found *= LORA_FACTOR
        why += f"; ten times that for LoRA ({SCHULMAN})"
    return float(f"{found:.0e}"), why


def global_batch(usual: Usual, rows: int, epochs: float, multiple: int) -> tuple[int, str]:
    """Rows of a step for data of so many, a multiple of ``multiple`` (data ranks), and why.

    The usual number, or as many as leave `STEPS` steps; a power of two where that can be.
    """
    wanted = min(usual.batch, max(FEWEST, rows * epochs / STEPS))
    found = 2 ** math.floor(math.log2(max(1.0, min(wanted, rows))))
    chosen = -(-found // multiple) * multiple
    if 2 * found > usual.batch:
        return chosen, f"as usual ({usual.source})"
    why = f"few, for {rows:,} rows; usual: {usual.batch} ({usual.source})"
    if chosen > found:
        why += f"; one for each of {multiple} data ranks"
    return chosen, why

"""A user's recipe made small: sizes shrink, structure never does.

Kept: family, tying, biases, norms, rotary scaling, windows, dropout, whether key/value heads are
shared, losses, optimizers, updates per rollout, tasks, packing. Shrunk: widths, vocabulary, depth,
lengths, batch. What the layouts asked for need (heads, layers, micro-batches) is never shrunk away.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shardwise.config.run import RunConfig
from shardwise.config.schema import Fp8Config, StageConfig
from shardwise.errors import ConfigError, DataError
from shardwise.metrics.jsonl import write_jsonl
from shardwise.models.common.config import DecoderConfig
from shardwise.ops.fp8 import WIDTHS
from shardwise.parallel import feasible
from shardwise.parallel.layout import Layout

STEPS = 3
HEAD_DIM, MICRO_BATCH = 8, 2
DECODED = 32  # widths of which multiples `rollout.native` decodes
SENTINEL_EVERY = 2
PRETRAIN_TOKENS, CHAT_TOKENS, NEW_TOKENS = 32, 160, 6
BYTE_WORDS = 260  # about what the byte-level tokenizer has; the exact number is filled in later
SMALL_DATA = 1 << 20  # bytes; a user's own files up to here are used as they are


def shrink(
    run: RunConfig, stage_name: str, layouts: Sequence[Layout], folder: Path
) -> dict[str, Any]:
    """A recipe (plain data) of one stage of ``run``, small, whose files lie in ``folder``.

    Raises ConfigError if a layout cannot be made small (none that the user's own sizes allow).
    """
    recipe = run.model_dump(mode="json", exclude={"init_from", "run_dir", "evaluate_start"})
    [stage] = [s for s in recipe["stages"] if s["name"] == stage_name]
    [config] = [s for s in run.stages if s.name == stage_name]
    engine = config.engine
    tokens = PRETRAIN_TOKENS if stage["kind"] == "pretrain" else CHAT_TOKENS
    model, batches = sizes(run, config, layouts)
    recipe["model"] |= model
    recipe["tokenizer"] = {"kind": "bytes"}
    recipe["evaluations"] = []
    recipe["stages"] = [stage]
    # Every model starts afresh, laid out as verify says.
    stage.pop("start_from", None)
    if "roles" in stage:
        said = {name: (role or {}).get("optimizer") for name, role in stage["roles"].items()}
        stage["roles"] = {n: {"optimizer": o} for n, o in said.items() if o is not None}
    updates = stage.get("updates_per_rollout", 1)
    stage["batch"] = {
        "global_batch": batches * MICRO_BATCH * updates,
        "micro_batch": MICRO_BATCH,
        "seq_len": tokens,
    }
    stage["steps"] = STEPS
    stage.pop("schedule")  # every step has the peak rate
    stage["engine"] |= {"layout": "dp1", "precision": "fp64", "compile": False, "device": "cpu"}
    if engine.fp8 is not None:
        stage["engine"]["fp8"]["sentinel"] |= {"every": SENTINEL_EVERY, "layers": 0}
    _data(run, stage, folder)
    return recipe


def sizes(
    run: RunConfig, stage: StageConfig, layouts: Sequence[Layout]
) -> tuple[dict[str, Any], int]:
    """Fields of a small model and a number of micro-batches that suit all of ``layouts``.

    Raises ConfigError where there is none.
    """
    tokens = PRETRAIN_TOKENS if stage.kind == "pretrain" else CHAT_TOKENS
    generates = hasattr(stage, "sampling")
    small = _model(run.model, layouts, tokens, stage.engine.fp8, generates)
    return small, _num_batches(run.model.model_dump(mode="json") | small, layouts)


def _model(
    model: Any, layouts: Sequence[Layout], tokens: int, fp8: Fp8Config | None, generates: bool
) -> dict[str, Any]:
    """The fields of the model's section that change."""
    assert isinstance(model, DecoderConfig)
    heads, kv_heads = _heads(model, layouts)
    multiple, layers = HEAD_DIM, 2
    if fp8 is not None:  # every rank's part of every product in whole tiles
        multiple = WIDTHS[fp8.recipe]
        layers += fp8.first_layers + fp8.last_layers
    least = min(max(1, kv_heads // x.tp) for x in layouts)
    head_dim = max(HEAD_DIM, multiple // math.gcd(multiple, least))
    if generates and model.hidden_size % DECODED == model.head_width % DECODED == 0:
        head_dim = DECODED  # what serves the user's rollouts serves the small model's
    width = heads * head_dim
    small: dict[str, Any] = {
        "num_heads": heads,
        "num_layers": min(model.num_layers, max(layers, *(x.num_chunks for x in layouts))),
        "max_seq_len": tokens,
        # The byte tokenizer's words, and one more where the user's number is odd.
        "vocab_size": BYTE_WORDS + (BYTE_WORDS + model.vocab_size) % 2,
    }
    if getattr(model, "head_dim", None) is not None:
        small["head_dim"] = head_dim
        if model.head_width * model.num_heads != model.hidden_size:
            width += math.lcm(head_dim, multiple)
    small["hidden_size"] = width
    if "num_kv_heads" in type(model).model_fields:
        small["num_kv_heads"] = kv_heads
    if getattr(model, "ffn_size", None) is not None:
        small["ffn_size"] = 2 * width + 3 * (model.ffn_size % 2)  # type: ignore[attr-defined]
    if getattr(model, "sliding_window", None):
        small["sliding_window"] = tokens // 3
        start = model.window_start_layer  # type: ignore[attr-defined]
        small["window_start_layer"] = min(start, small["num_layers"] - 1)
    return small


def _heads(model: DecoderConfig, layouts: Sequence[Layout]) -> tuple[int, int]:
    """The fewest heads that divide, are shared and are replicated as the user's are."""
    q, kv = model.num_heads, model.kv_heads
    options = (
        (g * r, g)
        for g, r in itertools.product(range(1, kv + 1), range(1, q // kv + 1))
        if (r > 1) == (q > kv)
    )
    for heads, shared in sorted(options):
        if heads > 1 and all(
            heads % (x.tp * (x.cp if x.cp_kind == "ulysses" else 1)) == 0
            and (shared % x.tp == 0) == (kv % x.tp == 0)
            and (shared % x.tp == 0 or x.tp % shared == 0)
            for x in layouts
        ):
            return heads, shared
    return q, kv


def _num_batches(model: dict[str, Any], layouts: Sequence[Layout]) -> int:
    """Micro-batches of one update: the fewest, from 8 on, that every layout can take."""
    probe = _ProbeModel(
        hidden_size=model["hidden_size"],
        num_layers=model["num_layers"],
        num_heads=model["num_heads"],
        num_kv_heads=model.get("num_kv_heads", model["num_heads"]),
    )
    for total in range(8, 129, 8):
        refused = [why for x in layouts if (why := _refusal(x, probe, total))]
        if not refused:
            return total
    every = ", ".join(map(str, layouts))
    raise ConfigError(
        f"no number of micro-batches suits all of {every}; with {total}: {refused[0]}"
    )


class _ProbeModel(DecoderConfig):
    """The sizes that `feasible` asks about."""

    family: str = "probe"
    num_kv_heads: int = 1

    @property
    def kv_heads(self) -> int:
        """See `DecoderConfig.kv_heads`."""
        return self.num_kv_heads


def _refusal(layout: Layout, model: DecoderConfig, total: int) -> str | None:
    if total % layout.dp:
        return f"{layout} does not divide them over {layout.dp} data ranks"
    case = feasible.Case(layout, model, False, total, 1)
    found = (row(case) for row in feasible.REFUSALS)
    return next((f"{layout}: {why}" for why in found if why), None)


# --- data ---------------------------------------------------------------------------------------


def _data(run: RunConfig, stage: dict[str, Any], folder: Path) -> None:
    """The user's own data where it is small or made by a program, else a seeded stand-in."""
    [config] = [s for s in run.stages if s.name == stage["name"]]
    data = getattr(config, "data", None)
    if data is not None and data.sources and not _is_small(data.sources):
        kind = {"sft": "chat-jsonl", "reward": "preference-jsonl"}.get(stage["kind"], "jsonl")
        rows = list(_STAND_INS[kind]())
        file = folder / "standin.jsonl"
        file.unlink(missing_ok=True)
        write_jsonl(file, rows)
        stage["data"] |= {"sources": [{"kind": kind, "path": str(file)}]}
    if data is not None:
        stage["data"]["validation"] = []
        if "held_out" in stage["data"]:
            stage["data"]["held_out"] = 0.0
        if "too_long" in stage["data"]:
            stage["data"]["too_long"] = "truncate"
    if "num_problems" in stage:
        stage["num_problems"] = min(stage["num_problems"], 64)
    if "answers_per_problem" in stage:
        stage["answers_per_problem"] = min(stage["answers_per_problem"], 3)
        stage["num_held_out"] = 0
    if "samples_per_prompt" in stage:
        stage["samples_per_prompt"] = min(stage["samples_per_prompt"], 3)
        stage["sampling"]["max_new_tokens"] = NEW_TOKENS
        stage["keep_rollouts_every"] = 0
        # The second time, a rollout's weights have moved; a third shows nothing new.
        stage["epochs_per_rollout"] = min(stage["epochs_per_rollout"], 2)
        if "critic_warmup_steps" in stage:  # two steps of three train the actor
            stage["critic_warmup_steps"] = min(stage["critic_warmup_steps"], 1)
        # An untrained model earns nothing from a verifier, and nothing would be learnt.
        file = folder / "reward.py"
        file.write_text(_REWARD, encoding="utf-8")
        stage["reward"] = {"parts": [{"kind": "user", "function": f"{file}:score"}]}


_REWARD = '''"""A reward that any text earns some of."""


def score(question, completion, answer, meta):
    return (sum(completion.encode()) * 7 + len(completion)) % 5 / 4
'''


def _is_small(sources: Sequence[Any]) -> bool:
    try:
        files = [f for s in sources for f in s.files()]
        return all(s.kind != "stdlib" for s in sources) and (
            0 < sum(f.stat().st_size for f in files) <= SMALL_DATA
        )
    except (DataError, OSError):
        return False


def _documents() -> Iterator[dict[str, Any]]:
    """Short documents of seeded letters: several to a packed row, some longer than one."""
    rng = random.Random(0)
    for i in range(160):
        length = rng.choice((3, 7, 11, 20, 45))
        yield {"id": i, "text": "".join(rng.choices("abcdefgh ", k=length))}


def _chats() -> Iterator[dict[str, Any]]:
    rng = random.Random(1)
    for _ in range(96):
        asked = "".join(rng.choices("abcd ", k=rng.randint(2, 12)))
        said = "".join(rng.choices("wxyz ", k=rng.randint(1, 12)))
        yield {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": said},
            ]
        }


def _preferences() -> Iterator[dict[str, Any]]:
    rng = random.Random(2)
    for i in range(64):
        answers = ["".join(rng.choices("wxyz ", k=rng.randint(1, 9))) for _ in range(2 + i % 3)]
        yield {"prompt": "".join(rng.choices("abcd ", k=rng.randint(2, 9))), "answers": answers}


_STAND_INS = {"jsonl": _documents, "chat-jsonl": _chats, "preference-jsonl": _preferences}

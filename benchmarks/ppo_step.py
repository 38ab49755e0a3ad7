"""A PPO update beside TRL's, on the same weights and the same token work.

    python benchmarks/ppo_step.py [--turns 10]

A byte-level Llama of 4.2M parameters in fp32 as actor and reference, its body with a scalar head
as critic and reward model; two prompts with eight completions of exactly 64 tokens each (nothing
ends a completion, on either side), four epochs over the rollout. Ours is the `ppo` stage itself.
First both replay the same stored completions and must agree on log-probabilities, values,
advantages (that is, on rewards too) and on the gradient norms of actor and critic; then they take
turns in one process, warm-up not counted.

TRL dropped PPO after 1.12, and the other benchmarks need a newer one: 1.12.0 is installed for this
script alone, into a folder of its own (``--trl``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import Laps, clock, load, stage_context, table, use_threads, verdict
from rl import EndlessTokenizer, Replay, text_of

from shardwise.data.chat import encode_chat
from shardwise.rewards import prompt_messages
from shardwise.stages.base import StageContext
from shardwise.stages.play import Group
from shardwise.stages.ppo import PpoStage

TARGET = 2.0
TOLERANCE = 1e-4
OURS, TRL = "shardwise", "TRL 1.12"
LR = 1e-6
NUM_PROMPTS, GROUP, LENGTH, EPOCHS = 2, 8, 64, 4
FOLDER = Path.home() / ".cache" / "shardwise" / "trl-1.12.0"


def provide_trl(folder: Path) -> None:
    """Make ``import trl`` find 1.12.0, installed into ``folder`` on the first use."""
    if not (folder / "trl").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, "trl==1.12.0"], check=True)
    sys.path.insert(0, str(folder))


class FreshContext(StageContext):
    """All roles start from their initial weights."""

    def start_of(self, role: str) -> Path | None:
        """Nowhere."""
        return None


def our_stage(hidden: int, layers: int, length: int) -> PpoStage:
    """The stage as a run would build it; for 256 and 4, a model of 4.2M parameters."""
    tokenizer = EndlessTokenizer()
    model = {
        "family": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": hidden // 64,
        "num_kv_heads": hidden // 64,
        "ffn_size": 4 * hidden,
        "max_seq_len": 512,
    }
    stage = {
        "kind": "ppo",
        "steps": 1,
        "batch": {"global_batch": NUM_PROMPTS, "micro_batch": NUM_PROMPTS},
        "samples_per_prompt": GROUP,
        "sampling": {"max_new_tokens": length},
        "verifier_weight": 0.0,
        "reward_model_weight": 1.0,
        "epochs_per_rollout": EPOCHS,
        "loss": {"preset": "trl_default"},
        "optimizer": {"lr": LR, "beta2": 0.999, "weight_decay": 0.0},
        "engine": {"precision": "fp32", "device": "cpu", "max_grad_norm": 0.0},
    }
    ctx = stage_context(model, stage, tokenizer)
    return PpoStage(FreshContext(**vars(ctx)))


def trl_trainer(stage: PpoStage, length: int) -> Any:
    """TRL on the stage's weights and prompts."""
    from peers.trl_ppo import TrlPpo

    assert stage.reference is not None and stage.reward_model is not None
    return TrlPpo(
        stage.ctx.run.model,  # type: ignore[arg-type]
        stage.engine.weights(),
        stage.reference.weights(),
        stage.critic.weights(),
        stage.reward_model.weights(),
        stage.ctx.tokenizer,
        [text_of(stage, stage.problems[int(i)]) for i in stage.order.batch(0, NUM_PROMPTS)],
        group_size=GROUP,
        length=length,
        lr=LR,
        epochs=EPOCHS,
    )


def stored_rollout(stage: PpoStage, length: int) -> list[Group]:
    """Groups of step 0 with random tokens."""
    generator = torch.Generator().manual_seed(1)
    groups = []
    for index in stage.order.batch(0, NUM_PROMPTS):
        problem = stage.problems[int(index)]
        messages = prompt_messages(problem, stage.config.task)
        prompt, _ = encode_chat(stage.ctx.tokenizer, messages, add_generation_prompt=True)
        tokens = torch.randint(256, (GROUP, length), generator=generator).tolist()
        blank = [[0.0] * length] * GROUP
        texts, rewards = [""] * GROUP, [0.0] * GROUP
        stopped = [False] * GROUP
        groups.append(
            Group(problem, int(index), prompt, tokens, blank, stopped, texts, rewards, "stored")
        )
    return groups


def our_replay(stage: PpoStage, groups: list[Group]) -> dict[str, Any]:
    """The stored groups through the stage, with a learning rate of zero; by (prompt, tokens)."""
    player = stage.player
    stage.player = Replay(groups)  # type: ignore[assignment]
    try:
        metrics = stage.train_step(0, 0.0)
    finally:
        stage.player = player
    found: dict[str, Any] = {
        "policy": metrics["grad_norm"],
        "value": metrics["critic_grad_norm"],
    }
    for name in ("old_logprobs_BT", "values_BT", "advantages_BT"):
        found[name] = torch.stack([torch.as_tensor(v) for g in groups for v in g.tracks[name]])
    return found


def agreement(ours: dict[str, Any], theirs: Any, order: list[int]) -> dict[str, float]:
    """Largest differences; the gradient norms' are relative. ``order``: ours for each of theirs."""

    def worst(name: str, other: torch.Tensor) -> float:
        return float((ours[name][order] - other).abs().max())

    return {
        "log-probabilities": worst("old_logprobs_BT", theirs.logprobs),
        "values": worst("values_BT", theirs.values),
        "advantages": worst("advantages_BT", theirs.advantages),
        "policy gradient norm": abs(ours["policy"] / theirs.policy_norm - 1.0),
        "value gradient norm": abs(ours["value"] / theirs.value_norm - 1.0),
    }


def check(stage: PpoStage, trl: Any, length: int) -> dict[str, float]:
    """Replay on both sides, print and return the differences; SystemExit if they are too large."""
    groups = stored_rollout(stage, length)
    ours = our_replay(stage, groups)
    theirs = trl.replay({tuple(g.prompt): g.tokens for g in groups})
    left = {tuple(g.prompt): list(range(i * GROUP, (i + 1) * GROUP)) for i, g in enumerate(groups)}
    order = [left[tuple(p)].pop(0) for p in theirs.prompt_ids]
    differences = agreement(ours, theirs, order)
    for name, value in differences.items():
        print(f"replay: {name} differ by {value:.1e} at most")
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"the two trainers disagree by more than {TOLERANCE}: nothing was timed")
    return differences


def race(stage: PpoStage, trl: Any, turns: int, warmup: int) -> Laps:
    """TRL's trainer drives; after each of its updates ours makes one."""
    laps = Laps()
    began = clock.now()
    step = 0

    def turn() -> bool:
        nonlocal began, step
        theirs = clock.now() - began
        began = clock.now()
        stage.train_step(step, LR)
        if step >= warmup:
            laps.add(TRL, theirs)
            laps.add(OURS, clock.now() - began)
        step += 1
        began = clock.now()
        return step < warmup + turns

    trl.train(turn)
    return laps


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, check, race; returns what was printed, as data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=10, help="counted updates of each")
    parser.add_argument("--warmup", type=int, default=3, help="updates that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--trl", type=Path, default=FOLDER, help="where TRL 1.12.0 is, or goes")
    parser.add_argument("--tiny", action="store_true", help="a toy model, 8 tokens: a self-check")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")
    options = parser.parse_args(argv)
    provide_trl(options.trl)
    use_threads(options.threads)
    clock.kind = options.clock
    hidden, layers, length = (64, 2, 8) if options.tiny else (256, 4, LENGTH)
    before = load()
    stage = our_stage(hidden, layers, length)
    trl = trl_trainer(stage, length)
    differences = check(stage, trl, length)
    laps = race(stage, trl, options.turns, options.warmup)
    millions = stage.ctx.run.model.num_parameters() / 1e6  # type: ignore[attr-defined]
    print(
        f"\n{millions:.1f}M parameters a role, fp32, {NUM_PROMPTS * GROUP} completions x {length} "
        f"tokens, {EPOCHS} epochs, {options.threads} threads, {options.clock} clock, "
        f"load {before} before and {load()} after"
    )
    ratio = laps.ratio(OURS, TRL)
    rows = [[n, f"{laps.median(n):.3f}", f"{laps.ratio(n, TRL):.2f}"] for n in (OURS, TRL)]
    print(table(["", "s/update", "times TRL"], rows))
    print(f"against TRL: {verdict(ratio, TARGET)}")
    seconds = {n: laps.median(n) for n in (OURS, TRL)}
    result = {"replay": differences, "seconds": seconds, "ratio": ratio}
    if options.json:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])

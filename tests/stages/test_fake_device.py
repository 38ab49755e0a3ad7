"""Every stage takes a step on a device that is not the CPU, on many layouts.

What a device would refuse (tensors left on the CPU, operators of the CPU) ends the step. What it
would have to wait for is in one table, `WAITS`, each with its reason; a new one fails the test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from shardwise.config.load import load_config
from shardwise.data.chat import encode_chat
from shardwise.losses.causal_lm import CausalLM
from shardwise.metrics.writers import MetricsLogger
from shardwise.ops import flash, rope
from shardwise.parallel import mesh
from shardwise.parallel.layout import V_SHAPED, parse_layout, world_of
from shardwise.rewards import prompt_messages
from shardwise.stages.base import StageContext
from shardwise.stages.groups import Group
from shardwise.stages.registry import build_stage
from shardwise.stages.run import prepare_tokenizer, with_vocabulary
from tests.stages.recipes import recipe
from tests.support.fake_device import FakeDevice, Seen, process_group, register

Said = list[list[int]] | None
KINDS = ("pretrain", "sft", "reward", "grpo", "ppo")
# Layout to further keys of the engine.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp1": {"precision": "bf16"},
    "dp2.zero1": {"precision": "fp16"},
    "dp2.zero2": {"precision": "bf16", "recompute": "selective"},
    "dp2.zero3": {"precision": "bf16", "recompute": "full"},
    "dp4.hsdp2.zero3": {"precision": "bf16"},
    "tp2": {"precision": "fp32"},
    "tp2.sp": {"precision": "bf16"},
    "cp2.ring": {"precision": "bf16"},
    "cp2.ulysses": {"precision": "fp32"},
    "pp2.zbv": {"precision": "bf16"},
    "tp2.sp.pp2.interleaved.v2": {"precision": "bf16"},
    "dp2.zero3.tp2.cp2.ring": {"precision": "bf16"},
}


@dataclasses.dataclass(frozen=True)
class Wait:
    """Something that the host waits for in a step; see `tests.support.fake_device.Seen`."""

    kind: str
    place: str
    stages: tuple[str, ...]
    reason: str


RL = ("grpo", "ppo")
WAITS = [
    Wait(
        "number",
        "engines.reduction.LossSums.__init__",
        KINDS,
        "once an update, before its first forward pass, when the device has nothing else to do: "
        "the global counts by which the loss is divided",
    ),
    Wait(
        "number",
        "engines.reduction.LossSums.reduced",
        KINDS,
        "once an update, when all its passes are on their way: the metrics",
    ),
    Wait(
        "number",
        "engines.named_parameters.NamedParameters.grad_norm",
        KINDS,
        "once an update: the norm decides whether there is one, and by how much it is clipped",
    ),
    Wait(
        "shape",
        "losses.ranking.all_pairs",
        ("reward",),
        "once a micro-batch: how many pairs there are follows from the ratings",
    ),
    Wait(
        "to host",
        "stages.data_shards.forward_shard",
        RL,
        "once a micro-batch of a rollout, after all of its forward passes: the numbers that "
        "advantages are made of, on the host",
    ),
    Wait(
        "to device",
        "engines.native.NativeEngine.sum_over_data",
        ("ppo",),
        "once a rollout: the scores of a reward model, which all ranks are told",
    ),
    Wait(
        "number", "engines.native.NativeEngine.sum_over_data", ("ppo",), "the same, on its way back"
    ),
]
# Where a result is in fp64, which some devices lack: scalars, and numbers a token of a micro-batch.
FP64: dict[str, tuple[str, ...]] = {
    "engines.named_parameters.NamedParameters.grad_norm": KINDS,
    "engines.reduction.LossSums.__init__": KINDS,
    "engines.reduction.LossSums.add": KINDS,
    "engines.reduction.LossSums.reduced": KINDS,
    "engines.native.NativeEngine.sum_over_data": ("ppo",),
    "losses.causal_lm.CausalLM.counts": ("pretrain", "sft"),
    "losses.aggregate.fold": RL,
    "losses.aggregate.sequence_sum": ("grpo",),
    "losses.grpo.GRPOLoss.counts": ("grpo",),
    "losses.policy.masked_sum": RL,
    "losses.policy.means": RL,
    "losses.ppo.PolicyLoss.counts": ("ppo",),
    "losses.ppo.ValueLoss.counts": ("ppo",),
    "losses.ranking.num_rankings": ("reward",),
    "losses.ranking.ratings_and_keys": ("reward",),
    "losses.ranking._metrics": ("reward",),
    "losses.ranking._wins": ("reward",),
    "losses.ranking.all_pairs": ("reward",),
    "losses.ranking.pair_loss": ("reward",),
    "losses.ranking.rights": ("reward",),
    "data.batch.MicroBatch.to": ("reward",),
}


class _Given:
    """Completions that nobody wrote, in place of a rollout worker."""

    def __init__(self, ctx: StageContext, task: Any, scorer: Any) -> None:
        self.ctx, self.task = ctx, task

    def sync(self, engine: Any) -> None:
        for _ in engine.weights():
            pass

    def prompt_of(self, problem: Any) -> list[int]:
        messages = prompt_messages(problem, self.task)
        return encode_chat(self.ctx.tokenizer, messages, add_generation_prompt=True)[0]

    def rollout(
        self, problems: Any, sampling: Any, number: int, key: int, prompt_ids: range, need: Any
    ) -> list[Group]:
        draw = np.random.default_rng(key)
        groups = []
        for problem, prompt_id in zip(problems, prompt_ids, strict=True):
            sizes = draw.integers(1, sampling.max_new_tokens + 1, number)
            tokens = [draw.integers(0, 200, n).tolist() for n in sizes]
            rewards = [float(i % 2) for i in range(number)]
            groups.append(
                Group(
                    problem=problem,
                    prompt_id=prompt_id,
                    prompt=self.prompt_of(problem),
                    tokens=tokens,
                    logprobs=[[-5.0] * len(t) for t in tokens],
                    stopped=[True] * number,
                    texts=[""] * number,
                    rewards=[*rewards[:-1], None],
                    policy="",
                )
            )
        return [
            group
            if i in need[dist.get_rank()]
            else Group.told(group.problem, group.prompt_id, group.statistics())
            for i, group in enumerate(groups)
        ]


def _alike(value: Any, group: Any) -> list[Any]:
    """Where nobody else is: what all ranks would say, if all were as this one."""
    return [value] * group.size()


class _Fresh(StageContext):
    """Every role starts from its initial weights."""

    def initial_checkpoint(self, role: str) -> Path | None:
        return None


def _stage(kind: str, layout: str, folder: Path) -> Any:
    config = recipe(folder / "run", kind)
    cut = parse_layout(layout, world_of(layout))
    config["model"]["num_layers"] = cut.num_chunks
    size = cut.dp * (2 if cut.pp > 1 else 1)
    if kind in RL:
        config["stages"][0]["keep_rollouts_every"] = 0  # others would have to send what they hold
    config["stages"][0]["batch"] |= {"global_batch": size, "micro_batch": 1}
    config["engine"] |= {"layout": layout, **LAYOUTS[layout]}
    if kind == "ppo":
        once = {"updates_per_rollout": 1, "epochs_per_rollout": 1}
        config["stages"][0] |= {"reward_model_weight": 0.5, **once}
    if kind == "grpo":
        config["stages"][0]["loss"] = {"preset": "grpo_deepseekmath"}
    run = load_config(config).config
    tokenizer = prepare_tokenizer(run, folder, 0)
    run = with_vocabulary(run, tokenizer)
    logger = MetricsLogger(folder, rank=1)
    return build_stage(_Fresh(run, run.stages[0], tokenizer, folder, logger, None))


def step(
    kind: str, layout: str, rank: int, said: Said = None, planted: str = ""
) -> tuple[set[Seen], set[str], Said]:
    """One step of one rank: what was seen, the operators, and what it said to other ranks."""
    try:
        return _step(kind, layout, rank, said, planted)
    except Exception:  # PyTorch's do not all travel between processes
        raise AssertionError(traceback.format_exc()) from None


def _step(
    kind: str, layout: str, rank: int, said: Said, planted: str
) -> tuple[set[Seen], set[str], Said]:
    device = register()
    with (
        tempfile.TemporaryDirectory() as folder,
        process_group(rank, world_of(layout)),
        mock.patch("shardwise.stages.base.pick_device", lambda wish: device),
        mock.patch("shardwise.stages.policy.RolloutWorker", _Given),
        mock.patch("shardwise.stages.row_holders.gather_json", _alike),
        mock.patch.dict(mesh._GROUPS, clear=True),
        # An error in a thread of autograd's would end the process.
        torch.autograd.set_multithreading_enabled(False),
        FakeDevice(None if said is None else [torch.tensor(m) for m in said]) as watched,
    ):
        live = _stage(kind, layout, Path(folder))
        watched.forget()  # what building took
        with PLANTED[planted]() if planted else contextlib.nullcontext():
            metrics = live.train_step(0, 1e-3)
    assert math.isfinite(metrics["loss"])
    return watched.seen, watched.operators, [m.tolist() for m in watched.saying]


def _read_a_mask() -> Any:
    """A loss that looks at a value."""
    original = CausalLM.__call__

    def call(self: CausalLM, logits: Any, batch: Any) -> Any:
        bool(batch.loss_mask_BT.any())
        return original(self, logits, batch)

    return mock.patch.object(CausalLM, "__call__", call)


def _forget_the_device() -> Any:
    """Angles that are made on the CPU."""
    original = rope.frequencies
    return mock.patch.object(
        rope, "frequencies", lambda *args, **kwargs: original(*args, **kwargs | {"device": "cpu"})
    )


@contextlib.contextmanager
def _flash_attention() -> Iterator[None]:
    """flash-attn's path, without its kernel: which documents there are is worked out for it."""

    def attention(q: Any, k: Any, v: Any, starts: Any, window: Any) -> Any:
        assert starts is not None and starts.device.type == q.device.type
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with (
        mock.patch.object(flash, "unusable", lambda *_: None),
        mock.patch.object(flash, "attention", attention),
    ):
        yield


PLANTED: dict[str, Callable[[], Any]] = {
    "read": _read_a_mask,
    "cpu": _forget_the_device,
    "flash": _flash_attention,
}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """Of its own: a registered device stays."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield pool


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_where_it_says(process: ProcessPoolExecutor, kind: str, layout: str) -> None:
    seen, operators, said = set[Seen](), set[str](), None
    for rank in _ranks(layout):
        found, used, said = process.submit(step, kind, layout, rank, said).result()
        seen, operators = seen | found, operators | used
    assert {s for s in seen if s.kind != "fp64"} == {
        Seen(w.kind, w.place) for w in WAITS if kind in w.stages
    }
    assert {s.place for s in seen if s.kind == "fp64"} == {
        place for place, stages in FP64.items() if kind in stages
    }
    assert not {o for o in operators if "cpu" in o or "mkl" in o}


def test_documents_are_found_without_asking_the_device(process: ProcessPoolExecutor) -> None:
    seen, operators, _ = process.submit(step, "pretrain", "dp1", 0, None, "flash").result()
    assert "aten::bitwise_xor.Tensor" not in operators, "no token was compared with another"
    assert {s for s in seen if s.kind != "fp64"} == {
        Seen(w.kind, w.place) for w in WAITS if "pretrain" in w.stages
    }


def test_what_is_planted_is_found(process: ProcessPoolExecutor) -> None:
    seen, _, _ = process.submit(step, "sft", "dp1", 0, None, "read").result()
    assert Seen("number", "engines.reduction.LossSums.add") in seen
    with pytest.raises(AssertionError, match="at least two devices, imaginary"):
        process.submit(step, "sft", "dp1", 0, None, "cpu").result()


def _ranks(layout: str) -> list[int]:
    """One that is not the first; of a pipeline, one of the last stage and then one of the first.

    The last stage tells the others which metrics there are.
    """
    cut = parse_layout(layout, world_of(layout))
    if cut.pp == 1:
        return [cut.world - 1]
    each = cut.world // cut.pp
    return [0, each] if cut.schedule in V_SHAPED else [each, 0]

"""The plain engine against loops written by hand, against itself, and against the native engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise import checkpoint
from shardwise.config.optimizers import AdamConfig, AdamWConfig, OptimizerConfig, SgdConfig
from shardwise.config.schema import EngineConfig, NativeConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine, Setup
from shardwise.engines.plain import PlainEngine
from shardwise.engines.plain_batch import documents, join, pad
from shardwise.engines.plain_config import PlainConfig
from shardwise.engines.registry import build_engine
from shardwise.errors import ConfigError
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.logprobs import valid_logprobs
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.ops.attention import BRANCH_SHIFT, PADDING
from shardwise.parallel.layout import parse_layout
from tests.support import toy
from tests.support.pool import RankPool

LR, UPDATES = 1e-2, 3
ADAMW = AdamWConfig(lr=LR, eps=1e-4)
OPTIMIZERS = {
    "adamw": ADAMW,
    "adam": AdamConfig(kind="adam", lr=LR, eps=1e-4, beta1=0.8),
    "sgd": SgdConfig(kind="sgd", lr=LR, momentum=0.8, nesterov=True),
}


def setup(
    model: Any,
    config: EngineConfig,
    layout: str = "dp1",
    optimizer: OptimizerConfig | None = ADAMW,
    **changes: Any,
) -> Setup:
    device = torch.device("cpu")
    parsed = parse_layout(layout, 1 if layout == "dp1" else dist.get_world_size())
    return Setup(model, config, parsed, device, 7, "test", optimizer, **changes)


def plain(model: Any, precision: str = "fp64", **keys: Any) -> PlainEngine:
    optimizer, wide = keys.pop("optimizer", ADAMW), keys.pop("wide_logits", False)
    config = PlainConfig.model_validate({"kind": "plain", "precision": precision, **keys})
    return PlainEngine(setup(model, config, optimizer=optimizer, wide_logits=wide))


def packed(rows: int = 4, tokens: int = 12, seed: int = 0) -> MicroBatch:
    """Rows of two documents and some padding; one answer in two branches."""
    batch = toy.batch(rows, tokens, seed=seed)
    segments = torch.zeros(rows, tokens, dtype=torch.int64)
    positions = torch.arange(tokens).expand(rows, -1).clone()
    for row in range(rows):
        second = 4 + row % 3
        segments[row, second:] = 1
        positions[row, second:] -= second
    segments[0, -4:-2] = 1 + (1 << BRANCH_SHIFT)
    segments[0, -2:] = 1 + (2 << BRANCH_SHIFT)
    positions[0, -2:] -= 2
    segments[1, -2:], positions[1, -2:] = PADDING, 0
    mask = batch.loss_mask_BT.clone()
    mask[1, -2:] = False
    return dataclasses.replace(
        batch, loss_mask_BT=mask, segment_ids_BT=segments, position_ids_BT=positions
    )


def train(engine: Engine, batches: list[list[MicroBatch]]) -> dict[str, Any]:
    """What every update gave, and the state behind the last."""
    log = []
    for batch in batches:
        metrics = engine.forward_backward(batch, CausalLM(accuracy=True))
        log.append([metrics["loss"], metrics["accuracy"], engine.step(LR)])
    tensors = {n: t.clone() for n, t in engine.full("weights")}
    for kind in engine.optimizer_states():
        tensors |= {f"{n} {kind}": t.clone() for n, t in engine.full(kind)}
    return {"log": log, **tensors}


def errors(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    a, b = torch.tensor(found["log"]), torch.tensor(wanted["log"])
    result = {"log": float((a - b).abs().max())}
    for name, value in wanted.items():
        if isinstance(value, Tensor):
            # A key bias has no gradient but rounding (softmax ignores it).
            scale = value.double().norm().clamp_min(1e-3)
            result[name] = float((found[name].double() - value.double()).norm() / scale)
    return result


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_is_the_loop_that_one_would_write(kind: str) -> None:
    c = OPTIMIZERS[kind]
    net = registry.build(toy.llama()).double()
    init_weights(net, 7)
    groups = [
        {"params": [p for n, p in net.named_parameters() if "norm" not in n and "embed" not in n]},
        {
            "params": [p for n, p in net.named_parameters() if "norm" in n or "embed" in n],
            "weight_decay": 0.0,
        },
    ]
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(groups, LR, 0.8, weight_decay=0.1, nesterov=True)
    else:
        cls = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
        optimizer = cls(groups, LR, (c.beta1, c.beta2), 1e-4, 0.1)
    engine = plain(toy.llama(), optimizer=c, max_grad_norm=0.3)
    clipped = 0
    for update in range(UPDATES):
        batch = toy.batch(6, seed=update)
        logits = net(batch.input_ids_BT, batch.position_ids_BT)[batch.loss_mask_BT]
        loss = torch.nn.functional.cross_entropy(logits, batch.targets_BT[batch.loss_mask_BT])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3).item()
        optimizer.step()
        clipped += norm > 0.3
        metrics = engine.forward_backward(batch.split(4), CausalLM())
        assert metrics == {"loss": pytest.approx(loss.item(), rel=1e-12)}
        assert engine.step(LR) == pytest.approx(norm, rel=1e-12)
    assert clipped
    for name, value in net.named_parameters():
        assert torch.allclose(engine.parameters[name], value, rtol=1e-11, atol=1e-13), name


@pytest.mark.parametrize("model", [toy.llama(), toy.gpt2(), toy.gpt2(attn_dropout=0.1)])
def test_how_batches_are_cut_changes_nothing(model: Any) -> None:
    batches = [[packed(seed=s), toy.batch(2, 9, seed=s)] for s in range(UPDATES)]
    whole = train(plain(model), batches)
    for split in ("rows", "padded", "documents"):
        if split == "documents" and getattr(model, "attn_dropout", 0.0):
            with pytest.raises(ConfigError, match="attn_dropout"):
                plain(model, split=split)
            continue
        found = errors(train(plain(model, split=split), batches), whole)
        assert max(found.values()) < 1e-12, (split, found)
        rows = plain(model, split=split).forward([packed()], valid_logprobs)[0]
        assert torch.allclose(rows, plain(model).forward([packed()], valid_logprobs)[0], atol=1e-12)


def test_updates_that_are_skipped_leave_weights_and_moments() -> None:
    batches = [[toy.batch(4, seed=s)] for s in range(UPDATES)]
    engine = plain(toy.llama(), skip=[1])
    found = train(engine, batches)
    assert found["log"][1][2] == float("inf")
    assert engine.state_dict().meta == {"updates": 3, "skipped": 1}
    again = plain(toy.llama())
    wanted = train(again, [batches[0]])
    again.updates = 2
    wanted = train(again, [batches[2]])
    assert all(torch.equal(found[n], v) for n, v in wanted.items() if n != "log")


def test_fp16_halves_its_scale_when_a_gradient_overflows() -> None:
    engine = plain(toy.llama(), "fp16", wide_logits=True)
    batch = toy.batch(4)
    engine.scale = 2.0**24
    before = engine.parameters["embed.weight"].clone()
    engine.forward_backward([batch], CausalLM())
    assert not torch.isfinite(torch.tensor(engine.step(LR)))
    assert engine.scale == 2.0**23
    assert torch.equal(before, engine.parameters["embed.weight"])
    engine.scale, engine.good_steps = 2.0**10, 1999
    engine.forward_backward([batch], CausalLM())
    assert 0 < engine.step(LR) < 100
    assert (engine.scale, engine.good_steps) == (2.0**11, 0)
    assert not torch.equal(before, engine.parameters["embed.weight"])


# --- batches --------------------------------------------------------------------------------------


def test_batches_are_joined_to_the_longest() -> None:
    long, short = packed(2, 12), toy.batch(1, 9)
    long = dataclasses.replace(long, extras={"a_BT": torch.ones(2, 12), "b_B": torch.ones(2)})
    short = dataclasses.replace(short, extras={"a_BT": torch.ones(1, 9), "b_B": torch.ones(1)})
    joined = join([long, short])
    assert joined.input_ids_BT.shape == (3, 12) and joined.sample_ids_B.tolist() == [0, 1, 0]
    assert joined.loss_mask_BT[2, 9:].tolist() == [False] * 3
    assert joined.segment_ids_BT is not None and long.segment_ids_BT is not None
    assert torch.equal(joined.segment_ids_BT[:2], long.segment_ids_BT)
    assert joined.extras["a_BT"][2].tolist() == [1.0] * 9 + [0.0] * 3
    assert joined.extras["b_B"].tolist() == [1.0] * 3
    filled = pad(long, 15).segment_ids_BT
    assert filled is not None and filled[:, 12:].unique().tolist() == [PADDING]


def test_documents_keep_their_branches() -> None:
    segments = packed().segment_ids_BT
    assert segments is not None
    assert [d.tolist() for d in documents(segments[0])] == [[0, 1, 2, 3], list(range(4, 12))]
    assert [d.tolist() for d in documents(segments[1])] == [[0, 1, 2, 3, 4], list(range(5, 10))]


# --- beside native --------------------------------------------------------------------------------


def native(
    model: Any, layout: str, precision: str, batches: list[MicroBatch], wide: bool
) -> dict[str, Any]:
    """Updates under a layout, two rows a micro-batch."""
    config = NativeConfig.model_validate(
        {"layout": layout, "precision": precision, "compile": False}
    )
    engine = build_engine(setup(model, config, layout, wide_logits=wide))
    shares = [b.split(b.num_rows // engine.data_size)[engine.data_rank].split(2) for b in batches]
    return train(engine, shares)


BOUNDS = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 0.15, "fp16": 0.03}


@pytest.mark.parametrize("layout,world", [("dp1", 1), ("dp2.zero2", 2), ("tp2.sp", 2)])
def test_native_computes_the_same(ranks: RankPool, layout: str, world: int) -> None:
    batches = [packed(seed=s) for s in range(UPDATES)]
    for model in (toy.llama(), toy.gpt2()):
        wanted = train(plain(model), [[b] for b in batches])
        for found in ranks.run(native, model, layout, "fp64", batches, False, world=world):
            assert max(errors(found, wanted).values()) < BOUNDS["fp64"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("wide", [False, True])
def test_native_computes_the_same_in_its_working_precision(
    ranks: RankPool, precision: str, wide: bool
) -> None:
    batches = [packed(seed=s) for s in range(UPDATES)]
    wanted = train(plain(toy.llama(), precision, wide_logits=wide), [[b] for b in batches])
    [found] = ranks.run(native, toy.llama(), "dp1", precision, batches, wide, world=1)
    differ = errors(found, wanted)
    assert 0 < max(differ.values()) < BOUNDS[precision], differ
    exact = train(plain(toy.llama()), [[b] for b in batches])
    lost = errors(wanted, exact)
    assert max(lost.values()) < BOUNDS[precision], lost


def save_native(folder: str, layout: str, step: int, start: str | None) -> dict[str, Any]:
    """Start from a checkpoint or from nothing, update once, save; weights and moments."""
    config = NativeConfig(layout=layout, precision="fp64", compile=False)
    engine = build_engine(setup(toy.llama(), config, layout))
    if start is not None:
        state = engine.state_dict()
        engine.load_state_dict(checkpoint.load(start, state.tensors)["engine"])
    batch = packed(seed=step)
    rows = batch.split(batch.num_rows // engine.data_size)[engine.data_rank]
    found = train(engine, [[rows]])
    state = engine.state_dict()
    checkpoint.save(folder, step, state.tensors, {"engine": state.meta})
    return found


def go_on_plainly(folder: str, start: str) -> None:
    """The second update, from native's checkpoint to one for native."""
    engine = plain(toy.llama())
    state = engine.state_dict()
    engine.load_state_dict(checkpoint.load(start, state.tensors)["engine"])
    assert engine.updates == 1
    train(engine, [[packed(seed=2)]])
    state = engine.state_dict()
    checkpoint.save(folder, 2, state.tensors, {"engine": state.meta})


def test_a_checkpoint_goes_from_native_to_plain_and_back(ranks: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path)
    ranks.run(save_native, folder, "tp2", 1, None, world=2)
    ranks.run(go_on_plainly, folder, f"{folder}/step_00000001", world=1)
    found = ranks.run(save_native, folder, "dp2.zero2", 3, f"{folder}/step_00000002", world=2)
    wanted = train(plain(toy.llama()), [[packed(seed=s)] for s in (1, 2, 3)])
    wanted["log"] = wanted["log"][2:]
    assert max(errors(found[0], wanted).values()) < BOUNDS["fp64"]

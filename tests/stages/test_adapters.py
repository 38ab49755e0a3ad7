"""Stages with adapters: what they save and resume from, what is served, and what a reference is."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise import checkpoint
from shardwise.adapters import peft
from shardwise.adapters.peft import PeftAdapter, Update
from shardwise.adapters.peft_write import write
from shardwise.adapters.quantise import read_back
from shardwise.adapters.registry import build_adapter
from shardwise.adapters.targets import targets
from shardwise.checkpoint import adapted
from shardwise.checkpoint.convert import convert, open_model
from shardwise.config.load import load_config
from shardwise.engines.shared_base import SharedBase
from shardwise.errors import CheckpointError, ConfigError, UserError
from shardwise.models import registry as models
from shardwise.rollout.generator import Generator
from shardwise.stages.lineage import LineageError
from shardwise.stages.loop import flops_per_token
from shardwise.stages.rollout_worker import RolloutWorker
from shardwise.stages.run import preflight
from shardwise.verify.pool import RankError
from tests.adapters.support import adapter, plain, update
from tests.stages.recipes import KilledError, killed_at, metrics, recipe, run
from tests.support import toy
from tests.support.daily import daily
from tests.support.pool import RankPool

LORA = {"kind": "dora", "rank": 4, "lr_ratio": 4.0}


def stages(folder: Path) -> dict[str, Any]:
    """Pre-training, an adapter on it, and the same adapter in reinforcement learning."""
    config = recipe(folder, "pretrain", "sft", "grpo")
    for stage, start in zip(config["stages"][1:], ("new", "parent"), strict=True):
        stage["adapter"] = LORA | {"start": start}
    for stage in config["stages"]:
        stage["steps"] = 2
        stage["checkpoint"] = {"every": 1}
    config["stages"][2] |= {"loss": {"kl": "k3", "kl_coef": 0.1}, "samples_per_prompt": 2}
    config["stages"][2]["batch"] |= {"global_batch": 2}
    return config


def broken_off_and_resumed(folder: Path) -> None:
    config = stages(folder)
    for stage in ("sft", "grpo"):
        with killed_at(stage, 1), pytest.raises(KilledError):
            run(config)
    run(config)


def saved(folder: Path, stage: str) -> dict[str, Tensor]:
    return dict(checkpoint.read_tensors(folder / "stages" / stage / "checkpoints"))


def test_a_checkpoint_holds_the_adapter_and_says_on_what(ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks.run(run, stages(folder), world=1)
    names = {n.split(".")[0] for n in saved(folder, "grpo")} | {
        n for n in saved(folder, "sft") if ".adapter." not in n
    }
    assert names == {"model", "optim"}
    # Base and adapter make one model, for whoever opens it.
    base = dict(open_model(folder / "stages" / "pretrain" / "checkpoints").tensors)
    for stage in ("sft", "grpo"):
        path = folder / "stages" / stage / "checkpoints"
        own = {n.removeprefix("model."): t for n, t in saved(folder, stage).items()}
        opened = open_model(path)
        for name, value in opened.tensors:
            prefix = name.removesuffix("weight") + "adapter."
            if not name.endswith("weight") or f"{prefix}A" not in own:
                assert torch.equal(value, base[name]), name
                continue
            v = base[name] + 8.0 * own[f"{prefix}B"] @ own[f"{prefix}A"]
            wanted = own[f"{prefix}magnitude"][:, None] * v / v.norm(dim=1, keepdim=True)
            torch.testing.assert_close(value, wanted)
            assert not torch.equal(value, base[name]), name
        with pytest.raises(UserError, match="add --merge-adapter"):
            convert(path, tmp_path / f"{stage}-hf")
        convert(path, tmp_path / f"{stage}-hf", merge_adapter=True)
        _, tensors = models.from_hf(tmp_path / f"{stage}-hf")
        again = dict(open_model(path).tensors)
        assert all(torch.equal(t, again[n]) for n, t in tensors)
    # The reference is what the actor started from: the base with the adapter of then.
    first = next(r["kl"] for r in metrics(folder) if "kl" in r)
    assert abs(first) < 1e-6

    ranks.run(broken_off_and_resumed, tmp_path / "again", world=1)
    for stage in ("sft", "grpo"):
        one, two = saved(folder, stage), saved(tmp_path / "again", stage)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[n], two[n]) for n in one)

    shutil.rmtree(folder / "stages" / "pretrain")
    shutil.copytree(tmp_path / "again" / "stages" / "grpo", folder / "stages" / "pretrain")
    with pytest.raises(UserError, match="belongs to other weights than those in"):
        list(open_model(folder / "stages" / "sft" / "checkpoints").tensors)
    shutil.rmtree(folder / "stages" / "pretrain")
    with pytest.raises(UserError, match=r"its base .* is gone; put it there again"):
        list(open_model(folder / "stages" / "sft" / "checkpoints").tensors)


def test_a_resume_on_another_base_is_bad_usage(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "sft")
    config["model"]["vocab_size"] = 300
    config["stages"][0]["adapter"] = {"kind": "lora", "rank": 4}
    config["init_from"] = str(base := tmp_path / "base")
    model = load_config(config | {"init_from": None}).config.model
    models.to_hf(base, model, adapted.initial_tensors(model, 1))
    with pytest.raises(RankError):
        ranks.run(dies_at_two, config, world=1)
    shutil.rmtree(base)
    models.to_hf(base, model, adapted.initial_tensors(model, 2))
    [error] = ranks.run(refused, config, world=1)
    code, words = error
    assert code == 2
    assert f"made with another parent checkpoint (now init_from: {base}" in words
    assert "put back the weights that it started from" in words


OWN = {"rank": 2, "alpha": 4.0, "targets": ["q", "down"], "rank_pattern": {"layers.1.attn.q": 3}}


@pytest.mark.parametrize("quantise", daily(["nf4", None], 1))
def test_training_goes_on_from_a_folder_of_pefts(
    ranks: RankPool, tmp_path: Path, quantise: str | None
) -> None:
    """And so it does from its base, with a new adapter (QLoRA)."""
    base, folder = tmp_path / "base", tmp_path / "peft"
    config = recipe(tmp_path / "run", "sft")
    config["model"]["vocab_size"] = 300
    model: Any = load_config(config).config.model
    models.to_hf(base, model, adapted.initial_tensors(model, 1))
    asked = {"kind": "lora", "quantise": quantise} | OWN
    shapes = {t.path: (t.rows, t.columns) for t in targets(model, adapter(**OWN))}
    ranks_of = {path: 3 if path == "layers.1.attn.q" else 2 for path in shapes}
    updates = {
        path: Update(torch.randn(ranks_of[path], i) / 9, torch.randn(o, ranks_of[path]) / 9, 4.0)
        for path, (o, i) in shapes.items()
    }
    write(folder, PeftAdapter(updates, False), model, str(base))
    config["stages"][0] |= {"adapter": asked | {"start": "parent"}, "steps": 1}
    config["stages"][0]["optimizer"] = {"lr": 1e-9}
    ranks.run(run, config | {"init_from": str(folder)}, world=2)
    own = adapted.own_tensors(checkpoint.resolve(tmp_path / "run/stages/sft/checkpoints"))
    for path, found in updates.items():
        torch.testing.assert_close(own[f"{path}.adapter.A"], found.A_RI, atol=1e-6, rtol=0)
        torch.testing.assert_close(own[f"{path}.adapter.B"], found.B_OR, atol=1e-6, rtol=0)
    weights = dict(open_model(base).tensors)
    left = dict(read_back(weights.items(), "nf4", model)) if quantise else weights
    wanted = dict(peft.merge(left.items(), PeftAdapter(updates, False)))
    for name, value in open_model(tmp_path / "run/stages/sft/checkpoints").tensors:
        torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-5)

    config["stages"][0]["adapter"] = asked | {"start": "parent", "rank_pattern": {}}
    config["run_dir"] = str(tmp_path / "other")
    with pytest.raises(RankError, match=r"layers\.1\.attn\.q: rank 3, alpha 4 there, rank 2"):
        ranks.run(run, config | {"init_from": str(folder)}, world=1)
    config["stages"][0]["adapter"] = asked
    config["run_dir"] = str(tmp_path / "new")
    ranks.run(run, config | {"init_from": str(base)}, world=1)
    for name, value in open_model(tmp_path / "new/stages/sft/checkpoints").tensors:
        torch.testing.assert_close(value, left[name], atol=1e-4, rtol=1e-4)


def dies_at_two(config: dict[str, Any]) -> None:
    with killed_at("sft", 2):
        run(config)


def refused(config: dict[str, Any]) -> tuple[int, str]:
    with pytest.raises(LineageError) as found:
        run(config)
    return int(found.value.exit_code), str(found.value)


def test_weights_that_stand_still_have_no_gradients_to_count() -> None:
    model = toy.llama()
    saved = flops_per_token(model, 16) - flops_per_token(model, 16, adapts=True)
    assert saved == 2 * model.spec.matmul_parameters()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapter": LORA | {"targets": ["qq"]}}, "stages.0.adapter.targets: 'qq' names no linear"),
        ({"adapter": LORA | {"rank": 33}}, "stages.0.adapter.rank: 33 is beyond layers.0.attn.q"),
        ({"adapter": LORA | {"targets": ["embed"]}}, "embed shares its weight"),
        ({"freeze": {"patterns": ["layer.*"]}}, "stages.0.freeze.patterns: 'layer.*' names no"),
        ({"freeze": {"train_last": 3}}, "stages.0.freeze.train_last: 3 layers, and the model has"),
        ({"freeze": {"patterns": ["*"]}}, "stages.0.freeze: leaves no parameter to train"),
        (
            {"freeze": {"train_last": 1}, "engine": {"layout": "pp2"}},
            "leaves pipeline rank 0 nothing to train",
        ),
    ],
)
def test_what_a_model_cannot_have_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    config = recipe(tmp_path / "run", "sft")
    config["model"]["tie_embeddings"] = True
    config["stages"][0] |= change
    world = 2 if "engine" in change else 1
    with pytest.raises(ConfigError) as refused:
        preflight(load_config(config).config, world)
    assert said in str(refused.value)


def test_a_role_on_anothers_base_keeps_the_adapter_of_the_start() -> None:
    engine = plain(toy.llama(), adapter())
    update(engine, 0)
    before = {n: w.clone() for n, w in engine.weights()}
    reference = SharedBase(engine)
    update(engine, 1)
    after = {n: w.clone() for n, w in engine.weights()}
    assert all(torch.equal(w, before[n]) for n, w in reference.weights())
    assert all(torch.equal(w, after[n]) for n, w in engine.weights())
    assert any(not torch.equal(w, before[n]) for n, w in after.items())


class Faulty:
    """An engine that streams other weights than its own."""

    def __init__(self, engine: Any, stale: dict[str, Tensor], fault: str, draw: int) -> None:
        self.engine, self.stale, self.fault = engine, stale, fault
        self.random = random.Random(draw)
        self.adapter_config = engine.adapter_config

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        yield from self.engine.full(kind)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        now = {n: w.clone() for n, w in self.engine.weights()}
        adapted = [n for n in now if not torch.equal(now[n], self.stale[n])]
        if self.fault == "permuted":
            n = self.random.choice(adapted)
            like = [m for m in adapted if m != n and now[m].shape == now[n].shape]
            m = self.random.choice(like)
            now[n], now[m] = now[m], now[n]
        else:
            few = self.random.sample(adapted, self.random.randint(1, len(adapted) - 1))
            for n in few if self.fault == "partly" else adapted:
                now[n] = self.stale[n]
        yield from now.items()


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_weights_without_the_adapter_of_now_are_caught_at_the_first_sync(kind: str) -> None:
    asked = adapter(kind)
    engine = plain(toy.llama(), asked, precision="fp32")
    base = {n: w.clone() for n, w in engine.weights()}
    update(engine, 0)
    stale = {n: w.clone() for n, w in engine.weights()}
    update(engine, 1)
    worker = object.__new__(RolloutWorker)
    worker.ctx = SimpleNamespace(model=toy.llama())  # type: ignore[assignment]
    worker.dtype = torch.bfloat16
    beside = None if asked.merges else asked
    worker.generator = Generator(toy.llama(), worker.dtype, accelerate=False, adapter=beside)
    worker._adapter_arrived = False
    caught = 0
    for draw in range(25):
        for fault in ("base", "stale", "permuted", "partly"):
            other = base if fault == "base" else stale
            with pytest.raises(CheckpointError, match="is not served as the base with the adapter"):
                worker.sync(Faulty(engine, other, fault, draw))  # type: ignore[arg-type]
            caught += 1
    assert caught == 100
    worker.sync(engine)
    assert worker._adapter_arrived
    named = engine.full("weights")
    if asked.merges:
        named = build_adapter(asked, toy.llama()).merge(named)
    assert worker.generator.checksum == worker.generator.update_weights(named, hf_names=False)

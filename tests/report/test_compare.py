"""Runs compared: overlaid, by seed, with what differs and how each ended; damaged ones too."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import DataError, UserError
from shardwise.report import compare as c
from shardwise.report.api import compare, render_comparison
from shardwise.report.series import wilson
from tests.report import synthetic

STEPS = (60, 40, 40)


def run(folder: Path, seed: int = 0, lr: float = 1e-3, **changes: Any) -> Path:
    """A made-up run; ``changes`` go into its summary."""
    config = synthetic.CONFIG.replace("seed: 0", f"seed: {seed}").replace(
        "    steps: 900", f"    steps: 900\n    optimizer:\n      lr: {lr}"
    )
    config = config.replace("name: quickstart", f"name: {folder.name}")
    summary = synthetic.summary() | {"name": folder.name} | changes
    rows = synthetic.lines(seed, STEPS)
    return synthetic.write_run(folder, metrics=rows, summary_=summary, config=config)


def figure(sides: list[c.Side], name: str, stage: str = "") -> c.Figure:
    [found] = [f for f in c.figures(c.repeats(sides)) if (f.metric.name, f.stage) == (name, stage)]
    return found


def body(text: str) -> str:
    """The page without the source of plotly.js."""
    return html.unescape(re.sub(r"<script>/\*\*.*?</script>", "", text, count=1, flags=re.S))


def test_curves_lie_over_each_other_in_the_runs_own_colours(tmp_path: Path) -> None:
    sides = c.load([run(tmp_path / name, i) for i, name in enumerate("ab")])
    charts = {chart.title: chart for chart in c.overlays(sides)}
    assert {"Training loss, pretrain", "Validation loss, pretrain", "Reward, grpo"} <= set(charts)
    named = {t["name"]: t["line"]["color"] for t in charts["Reward, grpo"].traces if "name" in t}
    assert named == {"a": "--c1", "b": "--c2"}
    # What only one has is drawn, too; what nobody has, is not.
    assert "Training loss, reward" not in charts


def test_many_runs_keep_apart_and_are_drawn_lightly(tmp_path: Path) -> None:
    sides = c.load([run(tmp_path / f"r{i}", i) for i in range(8)])
    assert len({(s.color, s.dash) for s in sides}) == 8
    chart = next(x for x in c.overlays(sides) if x.title == "Training loss, pretrain")
    assert len(chart.traces) == 8  # no faint points behind them


def test_repeats_stand_together_with_mean_and_interval(tmp_path: Path) -> None:
    bits = {"val_bits_per_byte": 1.8}, {"val_bits_per_byte": 2.0}, {"val_bits_per_byte": 2.5}
    runs = [run(tmp_path / "a", 0, **bits[0]), run(tmp_path / "b", 1, **bits[1])]
    sides = c.load([*runs, run(tmp_path / "other", 0, lr=2e-3, **bits[2])])
    assert [[s.label for s in group] for group in c.repeats(sides)] == [["a", "b"], ["other"]]
    pair, alone = figure(sides, "val_bits_per_byte").cells
    assert pair is not None and alone is not None
    half = 12.706 * 0.1  # t of one degree of freedom times the standard error
    assert pair.value == pytest.approx(1.9) and pair.low == pytest.approx(1.9 - half, abs=1e-3)
    assert pair.best and pair.runs == 2
    assert alone.low is None and alone.close  # two seeds cannot tell it from theirs
    assert set(c.config_differences(sides)) == {"seed", "stages.pretrain.optimizer.lr"}


def test_shares_have_wilsons_interval_and_chance_is_marked(tmp_path: Path) -> None:
    accuracy = {"a": 0.50, "b": 0.53, "c": 0.80}
    sides = c.load(
        [run(tmp_path / n, lr=0.1 * i, accuracy={"grpo": v})
         for i, (n, v) in enumerate(accuracy.items(), 1)]
    )  # fmt: skip
    a, b, best = figure(sides, "accuracy", "grpo").cells
    assert a is not None and b is not None and best is not None
    assert (a.low, a.high) == wilson(0.5, 512)
    assert best.best and not a.close and not b.close
    sides = c.load([s.folder for s in sides[:2]])
    a, b = figure(sides, "accuracy", "grpo").cells
    assert a is not None and b is not None and b.best and a.close


def test_equal_shares_of_repeats_have_the_interval_of_all_their_problems(tmp_path: Path) -> None:
    same = {"accuracy": {"grpo": 0.5}}
    sides = c.load([run(tmp_path / name, i, **same) for i, name in enumerate("ab")])
    [cell] = figure(sides, "accuracy", "grpo").cells
    assert cell is not None and (cell.low, cell.high) == wilson(0.5, 1024)


def test_a_smaller_loss_and_a_larger_reward_are_better(tmp_path: Path) -> None:
    sides = c.load([run(tmp_path / "a", 0), run(tmp_path / "b", 0, lr=2e-3)])
    lines = [json.loads(x) for x in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {k: line[k] + 0.5 for k in ("loss", "reward_mean") if k in line}
    (tmp_path / "b" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    sides = c.load([s.folder for s in sides])
    for name, stage, winner in (("loss", "pretrain", 0), ("reward_mean", "grpo", 1)):
        cells = figure(sides, name, stage).cells
        assert [cell is not None and cell.best for cell in cells] == [winner == 0, winner == 1]


def test_the_page_and_its_data(tmp_path: Path) -> None:
    folders = [run(tmp_path / "a"), run(tmp_path / "b", lr=3e-3)]
    (folders[1] / "exit.json").write_text(json.dumps({"exit_code": 3, "reason": "<b>it burst"}))
    page, found = compare(folders)
    assert page == tmp_path / "comparison.html"
    text = page.read_text()
    assert "<b>it burst" not in text
    shown = body(text)
    for expected in (
        "2 runs; their recipes differ in stages.pretrain.optimizer.lr.",
        "exit code 3 (diverged): <b>it burst",
        "stages.pretrain.optimizer.lr",
        "Training loss, pretrain",
        "held-out accuracy, grpo",
    ):
        assert expected in shown, expected
    for section in re.findall(r'<a href="#([\w-]+)"', text):
        assert f'id="{section}"' in text
    assert found["differences"]["stages.pretrain.optimizer.lr"] == {"a": 0.001, "b": 0.003}
    assert [r["state"] for r in found["runs"]] == ["finished", "not finished"]
    assert json.loads(json.dumps(found)) == found
    assert compare(folders, tmp_path / "x.html")[0] == tmp_path / "x.html"


def test_runs_that_hold_little_or_nothing(tmp_path: Path) -> None:
    whole, failed, fresh = run(tmp_path / "whole"), tmp_path / "failed", tmp_path / "fresh"
    failed.mkdir()
    (failed / "exit.json").write_text(json.dumps({"exit_code": 2, "reason": "no such corpus"}))
    synthetic.write_run(fresh, metrics=[], config=synthetic.CONFIG.replace("quickstart", "fresh"))
    text = body(render_comparison(c.load([whole, failed, fresh])))
    assert "no such corpus" in text and "not every one has a config" in text
    text = body(render_comparison(c.load([failed, fresh])))
    assert "None of these runs has logged a figure yet." in text


def test_a_damaged_file_is_told_on_the_page(tmp_path: Path) -> None:
    sound, damaged = run(tmp_path / "sound"), run(tmp_path / "damaged")
    file = damaged / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:5], "{half\n", *lines[5:]]))
    sides = c.load([sound, damaged])
    [_, ending] = c.endings(sides)
    assert ending.state == "unreadable" and "line 6" in ending.words
    assert "unreadable" in body(render_comparison(sides))
    with pytest.raises(DataError, match="line 6"):
        c.load([damaged])
    (sound / "config.yaml").write_text("a: [")
    (damaged / "metrics.jsonl").write_text("".join(lines))
    (damaged / "exit.json").write_text("{")  # of no weight: said among the events
    sides = c.load([sound, damaged])
    assert [bool(s.error) for s in sides] == [True, False] and "config.yaml" in sides[0].error
    assert "exit.json is not JSON" in str(sides[1].run.events)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(UserError, match="named twice"):
        c.load([folder, link])
    with pytest.raises(UserError, match="no such folder"):
        c.load([folder, tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a run"):
        c.load([folder, tmp_path / "empty"])


def test_runs_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    folders = [run(tmp_path / x / "same") for x in ("one", "two")]
    assert [s.label for s in c.load(folders)] == ["one/same", "two/same"]
    (tmp_path / "one" / "same" / "summary.json").unlink()
    assert len({s.label for s in c.load(folders)}) == 2


def test_secrets_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "s3cr3t-value-in-environment")
    folders = [run(tmp_path / "a"), run(tmp_path / "b")]
    with (folders[0] / "config.yaml").open("a") as file:
        file.write("init_from: https://me:s3cr3t-value-in-environment@host/x\n")
    page, found = compare(folders)
    assert "s3cr3t" not in page.read_text() + json.dumps(found)

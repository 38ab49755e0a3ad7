"""The report: complete, closed, escaped; for whole runs, partial ones and very long ones."""

from __future__ import annotations

import functools
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shardwise
from shardwise.errors import ShardwiseError
from shardwise.metrics.jsonl import write_jsonl
from shardwise.report import figures, page
from shardwise.report.api import render, report, script_safe
from shardwise.report.rundata import load_run
from tests.report import synthetic

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\"'&"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    return synthetic.write_run(folder, summary_=synthetic.summary())


def body(run_dir: Path) -> str:
    """The page without the source of plotly.js."""
    text = report(run_dir).read_text()
    return re.sub(r"<script>/\*\*.*?</script>", "", text, count=1, flags=re.S)


def plots(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="plots">(.*?)</script>', text, re.S)
    assert found
    return list(json.loads(found.group(1)))


def test_whole_run(run_dir: Path) -> None:
    text = body(run_dir)
    for expected in (
        "Held-out bits per byte 1.874 (stdlib:validation), 10.4% below gzip -9",
        "went from 0.59 (sft) to 0.87 (grpo) on 512 problems",
        "the 95% intervals do not overlap",
        "majority answer 0.231",
        "[0.839, 0.897]",
        "706 GFLOP/s",
        "dp2.zero1",
        "8:57",
        "✓ correct",
        "✗ wrong",
        "Free continuations",
        "non-finite gradients; weights kept",
        "3f9c0a7be1d2",
        "stages/<wbr>sft/<wbr>checkpoints/<wbr>step_00000060",
        "random weights, seed 0",
        "An imaginary processor",
        "vocab_size: 4096",
        "1,138 lines",
    ):
        assert expected in html.unescape(text), expected
    titles = [html.unescape(t) for t in re.findall(r"<figure.*?<h3>(.*?)</h3>", text, re.S)]
    assert len(plots(text)) == len(titles) == text.count('class="plot"')
    for expected in ("Validation, bits per byte", "Reward, grpo", "Loss, sft", "Gradient norm"):
        assert expected in titles
    for section in re.findall(r'<a href="#(\w+)"', text):
        assert f'id="{section}"' in text


def test_the_room_is_called_like_the_function(run_dir: Path) -> None:
    assert shardwise.report(run_dir) == report(run_dir) == run_dir / "report.html"


def test_nothing_is_fetched(run_dir: Path) -> None:
    text = body(run_dir)
    assert not re.search(r"(?:src|href|action)\s*=\s*[\"']?(?:https?:)?//", text)
    assert "default-src 'none'" in text
    whole = report(run_dir).read_text()
    assert whole.count("plotly.js v") >= 1 and len(whole) > 1_000_000
    assert not list(run_dir.glob("*.part"))


def test_text_is_escaped_wherever_it_comes_from(tmp_path: Path) -> None:
    summary = synthetic.summary()
    summary["layout"] = summary["name"] = HOSTILE
    summary["machine"] = {HOSTILE: HOSTILE}
    summary["accuracy"] = {HOSTILE: 0.5, "b": 0.6}
    summary["samples"] = [
        {"stage": HOSTILE, "prompt": HOSTILE, "completion": HOSTILE, "answer": HOSTILE}
    ]
    summary["stages"] = [{"name": HOSTILE, "kind": HOSTILE, "checkpoint": HOSTILE, "steps": 3}]
    metrics = [
        {"time": 1.0, "stage": HOSTILE, "step": i, "kind": "train", "loss": 5.0, HOSTILE: 1.0}
        for i in range(1, 60)
    ]
    metrics.append({"time": 2.0, "stage": HOSTILE, "step": 3, "kind": "event", "message": HOSTILE})
    config = f"name: x\ninit_from: {json.dumps(HOSTILE)}\nstages: []\n"
    folder = synthetic.write_run(tmp_path / "r", metrics=metrics, summary_=summary, config=config)
    text = body(folder)
    assert "alert(1)</script>" not in text and "<img" not in text
    assert "{{ 7*7 }}" in html.unescape(text) and "49" not in page.verdict(load_run(folder))
    assert text.count("</script>") == text.count("<script")
    labels = json.dumps(plots(text))
    assert json.loads(labels)  # the data came through whole
    assert html.escape("</script><script>alert(1)") in text


def test_script_safe_round_trips() -> None:
    data = {"a": HOSTILE, "b": ["\u2028", 1.5, None]}
    text = script_safe(data)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == data
    with pytest.raises(ValueError, match="JSON"):
        script_safe([float("nan")])


def test_secrets_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "s3cr3t-value-in-environment")
    summary = synthetic.summary()
    summary["samples"] = [{"stage": "sft", "prompt": "s3cr3t-value-in-environment"}]
    config = synthetic.CONFIG + "init_from: https://me:s3cr3t-value-in-environment@host/x\n"
    folder = synthetic.write_run(tmp_path / "r", summary_=summary, config=config)
    text = body(folder)
    assert "s3cr3t" not in text and "&lt;redacted&gt;" in text


def keys_removed() -> list[str]:
    return list(synthetic.summary())


@pytest.mark.parametrize("key", keys_removed())
def test_any_missing_key_of_the_summary(tmp_path: Path, key: str) -> None:
    summary = synthetic.summary()
    del summary[key]
    folder = synthetic.write_run(
        tmp_path / "r", metrics=synthetic.lines(steps=(40, 20, 40)), summary_=summary
    )
    assert "<h1>" in render(load_run(folder))


@pytest.mark.parametrize("value", [None, "text", [], {}, -1, float("inf"), [None], {"x": None}])
def test_any_odd_value_in_the_summary(tmp_path: Path, value: Any) -> None:
    for key in synthetic.summary():
        summary = synthetic.summary() | {key: value}
        folder = synthetic.write_run(tmp_path / key, metrics=[], summary_=summary)
        assert "<h1>" in render(load_run(folder))


def test_only_pretrain_so_far(tmp_path: Path) -> None:
    metrics = [r for r in synthetic.lines() if r["stage"] == "pretrain" and r["step"] <= 300]
    folder = synthetic.write_run(tmp_path / "early", metrics=metrics)
    text = html.unescape(body(folder))
    assert "Not finished: pretrain at step 300 of 900" in text
    assert "0 of 60" in text  # sft is still to come, and says so
    assert "Loss, pretrain" in text and "Reward, " not in text
    assert "Time so far" in text


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"time": 1.0, "stage": "a", "step": 1, "kind": "train", "loss": 2.0}],
        [{"stage": "a", "loss": None, "loss_nonfinite": "nan"}],
        [{"kind": "event"}, {}],
        [{"stage": "a", "step": 0, "kind": "eval", "accuracy": 0.5}],
    ],
)
def test_hardly_anything(tmp_path: Path, metrics: list[dict[str, Any]]) -> None:
    folder = synthetic.write_run(tmp_path / "r", metrics=metrics, config=None)
    assert "not finished" in render(load_run(folder))


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ShardwiseError, match="is not a run"):
        report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ShardwiseError, match=r"summary\.json is not JSON"):
        report(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ShardwiseError, match="must hold a mapping"):
        report(tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ShardwiseError, match=r"config\.yaml"):
        report(tmp_path)


def test_long_runs_are_drawn_small_and_honestly(tmp_path: Path) -> None:
    n = 30_000
    values = 3 + np.random.default_rng(0).standard_normal(n) * 0.01
    values[12_345] = 99.0
    path = tmp_path / "r" / "metrics.jsonl"
    rows = (
        {"time": 1.0, "stage": "a", "step": i + 1, "kind": "train", "loss": float(v)}
        for i, v in enumerate(values)
    )
    write_jsonl(path, rows)
    run = load_run(path.parent)
    (chart,) = figures.all_charts(run)
    band, line = chart.traces
    assert max(band["y"]) == 99.0  # one point in 30,000 is still to be seen
    assert len(line["x"]) <= 1000 and len(band["x"]) <= 2000
    assert "30,000 points in groups of 30" in chart.caption
    assert len(script_safe([chart.traces])) < 200_000


def test_notes_and_metrics_make_one_list_of_events(tmp_path: Path) -> None:
    metrics = [
        {"time": 5.0, "stage": "a", "step": 9, "kind": "event", "event": "skipped", "message": "m"}
    ]
    folder = synthetic.write_run(tmp_path / "r", metrics=metrics)
    write_jsonl(folder / "notes.jsonl", [{"time": 2.0, "event": "resumed", "message": "n"}])
    shown, total = page.events(load_run(folder))
    assert [e.event for e in shown] == ["resumed", "skipped"] and total == 2


def test_many_events_are_counted(tmp_path: Path) -> None:
    metrics = [
        {"time": float(i), "stage": "a", "step": i, "kind": "event", "event": "skipped"}
        for i in range(1000)
    ]
    folder = synthetic.write_run(tmp_path / "r", metrics=metrics)
    assert "The newest 200 of 1000." in body(folder)
    assert page.events(load_run(folder))[0][-1].step == "999"


def test_diagnosis_reaches_the_page(tmp_path: Path) -> None:
    metrics = synthetic.lines()
    for row in metrics:
        if row["stage"] == "pretrain" and row["kind"] == "train":
            row["loss"] = 8.0
    text = html.unescape(body(synthetic.write_run(tmp_path / "r", metrics=metrics)))
    assert "pretrain · loss never falls" in text
    assert "Look at the learning rate first" in text


def test_healthy_run_has_no_finding(run_dir: Path) -> None:
    assert [d.found for d in page.diagnoses(load_run(run_dir))] == [[], [], []]


def test_accuracy_measured_once_is_no_curve(tmp_path: Path) -> None:
    metrics = [r for r in synthetic.lines() if r["kind"] != "eval"]
    metrics.append({"time": 9e9, "stage": "grpo", "step": 160, "kind": "eval", "accuracy": 0.87})
    run = load_run(synthetic.write_run(tmp_path / "r", metrics=metrics))
    titles = [c.title for c in figures.all_charts(run)]
    assert "Held-out accuracy after each stage" in titles
    assert "Held-out accuracy, grpo" not in titles
    assert page.tiles(run)[1].value == "87.0%"


def test_fp8_layers_have_charts_and_a_table(tmp_path: Path) -> None:
    looks = [
        {
            "stage": "pretrain",
            "step": step,
            "kind": "train",
            "loss": 3.0,
            "fp8_error": 0.05,
            "fp8.blocks.1.mlp.up.error": 0.02,
            "fp8.blocks.2.mlp.up.error": 0.01 * step,
            "fp8.blocks.2.mlp.up.underflow": 0.125,
            "fp8.blocks.2.mlp.up.overflow": 0.0,
            "fp8.blocks.2.mlp.up.drift": -0.75 if step == 10 else 0.5,
        }
        for step in (5, 10)
    ]
    fallback = {
        "stage": "pretrain",
        "step": 10,
        "kind": "event",
        "event": "fp8_fallback",
        "message": "blocks.1.mlp.up computes unquantised from now on: error 0.5 over 0.3",
    }
    run = load_run(synthetic.write_run(tmp_path / "run", metrics=[*looks, fallback]))
    fallen, worse = page.fp8_layers(run)
    assert (fallen.layer, fallen.fell, fallen.drift) == ("blocks.1.mlp.up", "at step 10", None)
    assert (worse.layer, worse.looks, worse.fell) == ("blocks.2.mlp.up", 2, "")
    assert (worse.error, worse.underflow, worse.drift) == (0.1, 0.125, -0.75)
    shown = render(run)
    assert "The worst look at each of 2 layers" in shown
    assert "Error of the FP8 products" in shown
    assert "fp8.blocks" not in shown  # not once more among the small curves


def test_a_run_of_nothing_but_nan_is_diagnosed(tmp_path: Path) -> None:
    metrics = [
        {"stage": "pretrain", "step": i, "kind": "train", "loss": float("nan")} for i in range(40)
    ]
    run = load_run(synthetic.write_run(tmp_path / "r", metrics=metrics))
    [found] = [c for d in page.diagnoses(run) for c in d.found]
    assert found.numbers["loss"] == 40
    render(run)


def test_a_stage_is_known_by_its_name_before_its_kind(tmp_path: Path) -> None:
    run = load_run(synthetic.write_run(tmp_path / "r"))
    run.config["stages"] = [
        {"kind": "pretrain", "name": "first", "steps": 1},
        {"kind": "sft", "name": "pretrain", "steps": 2},
        {"kind": "grpo", "steps": 3},
    ]
    steps = [run.stage_config(name).get("steps") for name in ("first", "pretrain", "grpo", "sft")]
    assert steps == [1, 2, 3, None]


def test_stages_of_a_summary_without_names(tmp_path: Path) -> None:
    summary = synthetic.summary()
    for stage, layout in zip(summary["stages"], ("dp2", "tp2", "pp2")):
        del stage["name"]
        stage["layout"] = layout
    run = load_run(synthetic.write_run(tmp_path / "r", summary_=summary))
    [tile] = [t for t in page.tiles(run) if t.label == "Layout"]
    assert tile.value == "3 layouts"


def test_a_run_whose_start_was_measured_is_finished_too(tmp_path: Path) -> None:
    start = {"stage": "start", "step": 0, "kind": "eval", "accuracy": 0.3}
    folder = synthetic.write_run(
        tmp_path / "run", metrics=[start, *synthetic.lines()], summary_=synthetic.summary()
    )
    assert page.is_finished(load_run(folder))


def test_a_run_without_held_out_figures_has_a_sentence_too(tmp_path: Path) -> None:
    """No lone full stop under the title, whatever is missing."""
    summary = {"stages": [{"name": "pretrain", "figures": {"loss": 2.5, "val_loss": 2.75}}]}
    config = "stages:\n  - kind: pretrain\n"
    write = functools.partial(synthetic.write_run, metrics=[], config=config)
    run = load_run(write(tmp_path / "a", summary_=summary))
    assert page.verdict(run) == "Pretrain: loss 2.5, val loss 2.75."
    del summary["stages"][0]["figures"]
    assert page.verdict(load_run(write(tmp_path / "b", summary_=summary))) == "Finished."


def test_figures_say_what_they_are_of(tmp_path: Path) -> None:
    folder = synthetic.write_run(tmp_path / "run", summary_=synthetic.summary())
    assert "Held-out bits per byte 1.874 (stdlib:validation)" in body(folder)
    assert "the last of" not in body(folder)
    write_jsonl(folder / "notes.jsonl", [{"kind": "event", "event": "started"}] * 2)
    assert "Wall time, the last of 2 starts" in body(folder)


def test_accuracy_of_the_stage_before_is_what_a_policy_started_from(tmp_path: Path) -> None:
    """It is measured after a stage only; the rule sees the fall all the same."""
    rows = [r for r in synthetic.lines() if "accuracy" not in r]
    for step, stage, accuracy in ((60, "sft", 0.8), (160, "grpo", 0.5)):
        head = {"time": 2e9, "stage": stage, "step": step, "kind": "eval"}
        rows.append(head | {"accuracy": accuracy, "num_problems": 512})
    run = load_run(synthetic.write_run(tmp_path / "run", metrics=rows))
    found = [c.rule for diagnosis in page.diagnoses(run) for c in diagnosis.found]
    assert found == ["reward hacking"]


def test_gzip_of_other_documents_is_no_reference(tmp_path: Path) -> None:
    def rows(gzip: float) -> list[dict[str, Any]]:
        head = {"time": 1.0, "kind": "eval", "val_bits_per_byte": 1.5}
        return [
            head | {"stage": "pretrain", "step": 9, "gzip_bits_per_byte": 2.0},
            head | {"stage": "sft", "step": 9, "gzip_bits_per_byte": gzip},
        ]

    for gzip, drawn in ((2.0, True), (2.5, False)):
        run = load_run(synthetic.write_run(tmp_path / str(gzip), metrics=rows(gzip)))
        chart = figures.all_charts(run)[0]
        assert chart.title == "Validation, bits per byte"
        assert ("gzip -9" in str(chart.traces)) == drawn

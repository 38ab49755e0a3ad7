"""The summary fits a screen of 80 x 30, whatever the run holds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.report.summary import HEIGHT, WIDTH, interval, shorten, summary_lines
from tests.report.synthetic import summary

EXPECTED = """\
shardwise  quickstart  dp2.zero1  done in 8:57

  last step   pretrain  loss 3.021, val loss 3.292
              sft       loss 0.31
              grpo      reward 0.701
  validation  1.874 bits per byte of stdlib:validation
              10.4% below gzip -9 (2.091), 6.4% below xz (2.003)
  accuracy    pretrain  0.004  [0.001, 0.014]
              sft       0.594  [0.551, 0.636]  +0.590
              grpo      0.871  [0.839, 0.897]  +0.277
              majority answer 0.231, 512 problems, 95% intervals
  speed       5.6k tokens/s, 0.61 of the machine's GEMM rate (706 GFLOP/s)
  expected    8:42: before 12 s, pretrain 5:50, sft 30 s, grpo 2:10

  stage        steps  tokens    time  checkpoint
  pretrain       900    1.8M    5:31  stages/pretrain/checkpoints/step_00000900
  sft             60    123k    26 s  stages/sft/checkpoints/step_00000060
  grpo           160    912k    2:28  stages/grpo/checkpoints/step_00000160

  report      runs/quickstart/report.html"""


def test_the_demo() -> None:
    assert "\n".join(summary_lines(summary(), "runs/quickstart/report.html")) == EXPECTED


def test_a_job_says_how_many_rows_it_made() -> None:
    job = {"name": "filter", "seconds": 2.0,
           "artifacts": {"kept": {"rows": 1204}, "dropped": {"rows": 3}}}  # fmt: skip
    line = summary_lines(summary() | {"stages": [job]})[-1]
    assert line.split() == ["filter", "2", "s", "rows:", "kept", "1,204,", "dropped", "3"]


def test_what_could_not_be_told_is_named() -> None:
    told = {"expected_seconds": {"before": 12.0, "sft": 30.0, "dpo": None, "reward": None}}
    [line] = [x for x in summary_lines(told) if "expected" in x]
    assert line.split(maxsplit=1)[1] == "42 s: before 12 s, sft 30 s, not told: dpo, reward"


def test_nothing_known() -> None:
    assert summary_lines({}) == ["shardwise  run", ""]


ODD = st.one_of(
    st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=200), st.lists(st.none())
)
FIGURES = st.dictionaries(st.sampled_from(["loss", "val_loss", "reward_mean"]), st.floats())
STAGE = st.dictionaries(
    st.sampled_from(
        [
            *("name", "kind", "steps", "tokens", "seconds", "wall_seconds", "checkpoint"),
            *("figures", "artifacts"),
        ]
    ),
    st.one_of(ODD, FIGURES),
)
ODD_SUMMARY = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(summary(), ODD)
    | {
        "stages": st.lists(st.one_of(STAGE, st.none()), max_size=30),
        "val_source": st.text(max_size=200),
        "accuracy": st.dictionaries(st.text(max_size=50), st.floats(), max_size=30),
        "num_problems": st.one_of(st.none(), st.integers(-1, 1000)),
        "expected_seconds": st.dictionaries(st.text(max_size=50), ODD, max_size=30),
    },
)


@given(ODD_SUMMARY, st.text(max_size=200))
def test_always_fits(data: dict[str, Any], path: str) -> None:
    lines = summary_lines(data, path)
    assert len(lines) <= HEIGHT
    assert max(map(len, lines)) <= WIDTH
    assert not any("\n" in line or "\r" in line for line in lines)


def test_what_is_left_out_is_counted() -> None:
    data: dict[str, Any] = {"accuracy": {f"s{i}": 0.5 for i in range(12)}}
    data["evaluations"] = [{"kind": "problems"}]
    assert any("and 7 more in the report" in line for line in summary_lines(data))


@pytest.mark.parametrize("width", [5, 6, 21])
def test_shorten_keeps_both_ends(width: int) -> None:
    text = "the beginning and the end"
    short = shorten(text, width)
    assert len(short) == width and short[:2] == "th" and short[-2:] == "nd"
    assert shorten("abc", 3) == "abc"


def test_interval_needs_a_sample_size() -> None:
    assert interval(0.5, None) == "" and interval(1.5, 10) == ""
    assert interval(0.871, 512) == "[0.839, 0.897]"

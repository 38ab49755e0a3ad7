"""Progress: few plain lines off a terminal, a live display on one, nothing on other ranks."""

from __future__ import annotations

import io
import os
import pty

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.metrics.declared import Metric, by_name
from shardwise.metrics.progress import Progress, describe, duration, number


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_rare_and_the_last_is_shown() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress([("pretrain", 100), ("sft", 3)], stream=stream, interval_s=5, clock=clock)
    for step in range(1, 101):
        clock.now += 1.0
        progress.update("pretrain", step, {"loss": 100.0 / step, "tokens_per_second": 5612.0})
    clock.now += 0.1
    for step in range(1, 4):
        progress.update("sft", step, {"loss": 1.0})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "pretrain 1/100  loss 100  tok/s 5.6k"
    assert lines[1] == "pretrain 6/100  loss 16.67  tok/s 5.6k  left 1:34"
    assert lines[-2] == "pretrain 100/100  loss 1  tok/s 5.6k"
    assert lines[-1] == "sft 3/3  loss 1"
    assert len(lines) == 20 + 1 + 1
    assert "\x1b" not in stream.getvalue()


def test_time_left_counts_this_process_only() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress([("a", 1000)], stream=stream, interval_s=0, clock=clock)
    progress.update("a", 901)  # resumed
    clock.now += 2.0
    progress.update("a", 902)
    assert "left 3:16" in stream.getvalue()  # 98 steps of 2 s


def test_messages_and_unannounced_stage() -> None:
    stream = io.StringIO()
    with Progress([], stream=stream) as progress:
        progress.message("a [bold]note[/bold]")
        progress.update("extra", 1, {"grad_norm": 0.5, "loss": None})
    assert stream.getvalue() == "a [bold]note[/bold]\nextra 1/?  grad 0.5\n"


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    progress = Progress([("a", 2)], rank=1, stream=stream, interval_s=0)
    progress.update("a", 2, {"loss": 1.0})
    progress.message("m")
    assert stream.getvalue() == ""


def test_live_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        progress = Progress([("pretrain", 2)], stream=stream)
        progress.update("pretrain", 1, {"loss": 2.5})
        progress.message("saved [step 1]")
        progress.update("pretrain", 2, {"loss": 1.25})
        progress.close()
        progress.message("done")
    shown = b""
    while chunk := _read(master):
        shown += chunk
    os.close(master)
    text = shown.decode()
    assert "loss 1.25" in text and "2/2" in text and "saved [step 1]" in text
    assert "\x1b[" in text
    assert text.rstrip().endswith("done")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux answers EIO once the other side has closed
        return b""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (1234, "1.2k"), (999_999, "1.0M"), (150e9, "150G"), (3e12, "3.0T")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(1e-9, 9e14))
def test_number_is_short(value: float) -> None:
    assert len(number(value)) <= 8


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (185, "3:05"),
        (7384, "2:03:04"),
        (273_600, "3 d 4 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stage_says_what_is_shown_of_it_and_how() -> None:
    metrics = (
        Metric("hits", "hits a step", format=".1f", line="hits"),
        Metric("seen", "documents seen", format="short", line="docs"),
        Metric("quiet", "not in a line"),
    )
    stream = io.StringIO()
    with Progress([("mine", 9)], declared={"mine": by_name(metrics)}, stream=stream) as progress:
        progress.update("mine", 1, {"quiet": 1, "seen": 12_345, "hits": 0.25, "loss": 1.0})
    assert stream.getvalue() == "mine 1/9  hits 0.2  docs 12.3k\n"


def test_describe_ignores_what_is_no_number() -> None:
    assert describe({"loss": "x", "grad_norm": 0.5, "unknown": 1}) == "grad 0.5"
    assert describe({"loss": 2.0, "val_loss": 2.5}) == "loss 2  val loss 2.5"

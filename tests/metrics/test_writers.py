"""MetricsLogger: resume leaves the file of an unfaulted run; listeners; secrets stay out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.schema import LoggingConfig
from shardwise.errors import ConfigError
from shardwise.metrics import tensorboard, wandb
from shardwise.metrics.jsonl import read_jsonl
from shardwise.metrics.writers import MetricsLogger, check_listeners

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "MY_SERVICE_PASSWORD": "correct-horse-battery",
}


class Failing:
    """A listener whose disk is full, or whose server is gone."""

    calls = 0

    def log(self, *said: Any) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")

    rewind = log

    def close(self) -> None:
        raise AssertionError("told although it failed")


def test_a_failing_listener_is_told_no_more(tmp_path: Path) -> None:
    logger, failing = MetricsLogger(tmp_path), Failing()
    logger._listeners.append(failing)
    for step in (1, 2):
        logger.log("a", step, {"loss": 1.0})
    logger.close()
    assert failing.calls == 1 and len(timeless(tmp_path / "metrics.jsonl")) == 2
    [note] = timeless(tmp_path / "notes.jsonl")
    assert note["event"] == "listener_failed" and "No space left" in note["message"]


def test_steps_that_the_file_lost_are_named(tmp_path: Path) -> None:
    for every, start, words in ((1, 5, "steps 3 to 5"), (4, 5, "steps 3 to 5"), (4, 3, "")):
        folder = tmp_path / f"{every}-{start}"
        logger = MetricsLogger(folder, LoggingConfig(every=every))
        for step in (1, 2):
            logger.log("a", step, {"loss": 1.0}, force=True)
        logger.rewind("a", start)
        logger.close()
        told = [n["message"] for n in timeless(folder / "notes.jsonl")]
        assert told == ([f"metrics.jsonl holds nothing of {words}"] if words else [])


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "time"} for r in read_jsonl(path)]


def run_stage(logger: MetricsLogger, stage: str, start: int, stop: int) -> None:
    """Steps start+1 .. stop as the loop logs them: a pure function of the step."""
    logger.rewind(stage, start)
    for step in range(start + 1, stop + 1):
        logger.log(stage, step, {"loss": 1.0 / step, "grad_norm": float("nan")})
        if step % 3 == 0:
            logger.log(stage, step, {"val_loss": 2.0 / step}, "validation")
        if step == 4:
            logger.event(stage, step, "skipped", "non-finite gradients")


@pytest.mark.parametrize("killed_at", range(1, 9))
@pytest.mark.parametrize("saved_at", [0, 3, 4])
def test_resume_equals_an_unfaulted_run(tmp_path: Path, killed_at: int, saved_at: int) -> None:
    if saved_at > killed_at:
        saved_at = 0
    clean = MetricsLogger(tmp_path / "clean")
    run_stage(clean, "a", 0, 3)
    run_stage(clean, "b", 0, 8)
    clean.close()

    faulted = MetricsLogger(tmp_path / "faulted")
    run_stage(faulted, "a", 0, 3)
    run_stage(faulted, "b", 0, killed_at)
    with (tmp_path / "faulted" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"time": 1, "stage": "b", "st')  # killed in the middle of a line
    again = MetricsLogger(tmp_path / "faulted")
    again.note("resumed", "continued", "b", saved_at)
    run_stage(again, "b", saved_at, 8)
    again.close()

    expected = timeless(tmp_path / "clean" / "metrics.jsonl")
    assert timeless(tmp_path / "faulted" / "metrics.jsonl") == expected
    assert len(expected) == 3 + 1 + 8 + 2 + 1
    notes = timeless(tmp_path / "faulted" / "notes.jsonl")
    assert [n["event"] for n in notes] == ["resumed"]


def test_line_form(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.log("pretrain", 3, {"loss": 2.5, "bad": float("inf"), "word": "x"})
    logger.sync()
    (line,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert line.pop("time") > 1e9
    assert line == {
        "stage": "pretrain",
        "step": 3,
        "kind": "train",
        "loss": 2.5,
        "bad": None,
        "bad_nonfinite": "inf",
        "word": "x",
    }
    with pytest.raises(ValueError, match="stage"):
        logger.log("a", 1, {"stage": 1})


def test_every_counts_steps_not_calls(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, LoggingConfig(every=4))
    for step in range(1, 11):
        logger.log("a", step, {"loss": 1.0}, force=step == 10)
    logger.log("a", 9, {"val_loss": 1.0}, "validation")
    steps = [(r["kind"], r["step"]) for r in read_jsonl(tmp_path / "metrics.jsonl")]
    assert steps == [("train", 4), ("train", 8), ("train", 10), ("validation", 9)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "run", LoggingConfig(tensorboard=True), rank=1)
    logger.log("a", 1, {"loss": 1.0})
    logger.note("x", "y")
    assert logger.rewind("a", 0) == 0
    logger.sync()
    logger.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "module"),
    [
        (LoggingConfig(tensorboard=True), tensorboard),
        (LoggingConfig(wandb="offline"), wandb),
    ],
)
def test_missing_library_is_told_first(
    tmp_path: Path, config: LoggingConfig, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'shardwise\[watch\]'"):
        check_listeners(config)
    with pytest.raises(ConfigError):
        MetricsLogger(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_libraries_are_imported_lazily() -> None:
    code = (
        "import sys, shardwise.metrics.writers\n"
        "assert not {'wandb', 'tensorboard'} & set(sys.modules), 'imported too early'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = MetricsLogger(tmp_path, LoggingConfig(tensorboard=True))
    for step in range(1, 6):
        logger.log("a", step, {"loss": 10.0 - step, "bad": float("nan"), "word": "x"})
    logger.rewind("a", 3)
    logger.log("a", 4, {"loss": 60.0})
    logger.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "a"))
    events.Reload()
    assert events.Tags()["scalars"] == ["a/loss"]
    assert [(e.step, e.value) for e in events.Scalars("a/loss")] == [
        (1, 9.0),
        (2, 8.0),
        (3, 7.0),
        (4, 60.0),
    ]


def test_a_resumed_stage_leaves_the_curves_of_earlier_ones(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 2):  # the second time as after a kill
        logger = MetricsLogger(tmp_path, LoggingConfig(tensorboard=True))
        if not start:
            for step in range(1, 10):
                logger.log("pretrain", step, {"loss": 1.0})
        logger.rewind("sft", start)
        for step in range(start + 1, 5):
            logger.log("sft", step, {"loss": 2.0})
        logger.close()
    for stage, num_steps in (("pretrain", 9), ("sft", 4)):
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage))
        events.Reload()
        steps = [e.step for e in events.Scalars(f"{stage}/loss")]
        assert steps == list(range(1, num_steps + 1))


OFFLINE = """
import sys
from pathlib import Path
from shardwise.config.schema import LoggingConfig
from shardwise.metrics.writers import MetricsLogger

secrets = sys.argv[2].split(",")
config = {"name": "run", "url": f"https://user:{secrets[2]}@example.org/x", "note": secrets[1]}
logger = MetricsLogger(Path(sys.argv[1]), LoggingConfig(wandb="offline"), "my-run", config)
print("a line with", secrets[1], flush=True)
for step in range(1, 4):
    logger.log("pretrain", step, {"loss": 1.5 / step, "text": f"key {secrets[0]}"})
logger.note("resumed", f"from https://user:{secrets[2]}@example.org/x")
logger.close()
"""


def test_wandb_offline_holds_scalars_and_no_secret(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    values = list(SECRETS.values())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    command = [sys.executable, "-c", OFFLINE, str(run_dir), ",".join(values)]
    done = subprocess.run(
        command, env=environment | SECRETS, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    binary = list(run_dir.glob("wandb/**/*.wandb"))
    assert len(binary) == 1
    stored = binary[0].read_bytes()
    assert b"pretrain/loss" in stored and b"my-run" in stored
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert run_dir / "metrics.jsonl" in files
    for path in files:
        for name, secret in SECRETS.items():
            assert secret.encode() not in path.read_bytes(), f"{name} is in {path}"
    # what was hidden was there to be hidden
    assert "<redacted>" in (run_dir / "metrics.jsonl").read_text()
    assert "<redacted>" in (run_dir / "notes.jsonl").read_text()
    assert b"<redacted>" in stored


def test_wandb_run_goes_on_under_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    values = ",".join(SECRETS.values())
    for _ in range(2):
        command = [sys.executable, "-c", OFFLINE, str(tmp_path / "run"), values]
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    ids = {p.stem for p in tmp_path.glob("run/wandb/**/*.wandb")}
    assert ids == {"run-" + (tmp_path / "run/wandb/run-id").read_text()}
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["step"] == 1

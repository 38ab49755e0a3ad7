"""Meters against the sums they stand for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from shardwise.launch.local import rank_environment
from shardwise.metrics import meters
from shardwise.metrics.meters import Throughput, host_info, memory_metrics, num_cores


def test_throughput() -> None:
    meter = Throughput(flops_per_token=1e6, limit_flops=1e9, window=2)
    meter.update(100, 10.0)
    meter.update(100, 1.0)
    metrics = meter.update(300, 1.0)  # the first, slow step has left the window
    assert metrics["tokens_per_second"] == 200
    assert metrics["model_tflops"] == pytest.approx(200 * 1e6 / 1e12)
    assert metrics["fraction_of_gemm"] == pytest.approx(0.2)
    assert meter.total()["tokens_per_second"] == pytest.approx(500 / 12)


def test_throughput_without_a_limit() -> None:
    assert set(Throughput().update(5, 1.0)) == {"tokens_per_second"}
    assert Throughput().total() == {}


def test_a_container_may_have_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files = (tmp_path / "memory.max", tmp_path / "limit_in_bytes", tmp_path / "none")
    monkeypatch.setattr(meters, "_LIMITS", files)
    assert meters.total_memory() == whole
    files[0].write_text("max\n")
    files[1].write_text(f"{2**62}\n")
    assert meters.total_memory() == whole
    files[0].write_text("1000000\n")
    assert meters.total_memory() == 1_000_000


def test_memory_grows_with_what_is_held() -> None:
    before = memory_metrics()
    block = torch.ones(150_000_000)  # 600 MB, touched, some of it in memory freed before
    after = memory_metrics()
    assert after["memory_gb"] >= after["rss_gb"] - 0.02 > 0
    assert after["rss_gb"] - before["rss_gb"] > 0.1
    assert block[0] == 1


def test_host_info_names_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "very-secret-value")
    info = host_info()
    assert info["torch"] == torch.__version__
    assert info["num_cores"] >= 1
    import getpass
    import socket

    text = repr(info)
    assert "very-secret-value" not in text
    assert socket.gethostname() not in text.split("'")
    assert getpass.getuser() not in text.split("'")


def test_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert num_cores() == host_info()["num_cores"] == 3
    assert rank_environment(3, 0)["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert rank_environment(1, 0)["OMP_NUM_THREADS"] == "3"

"""Meters against the sums they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.metrics.meters import Ema, Throughput, host_info, memory_metrics


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 0.999))
def test_ema_is_the_weighted_mean(values: list[float], decay: float) -> None:
    meter = Ema(decay)
    for value in values:
        meter.update(value)
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values)) / sum(weights)
    assert meter.value == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_ema_before_and_bounds() -> None:
    assert math.isnan(Ema().value)
    assert Ema(0.99).update(3.0) == 3.0
    with pytest.raises(ValueError, match="decay"):
        Ema(1.0)


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


def test_memory_grows_with_what_is_held() -> None:
    before = memory_metrics()
    block = torch.ones(40_000_000)  # 160 MB, touched
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

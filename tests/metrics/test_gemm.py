"""The GEMM rate is a plausible rate, bounded in work; the peak table knows its GPUs apart."""

from __future__ import annotations

import time

import pytest
import torch

from shardwise.metrics import gemm
from shardwise.metrics.gemm import measure_gemm, peak_bf16_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measures(dtype: torch.dtype) -> None:
    began = time.perf_counter()
    rate = measure_gemm(dtype, sizes=(64, 128), budget_s=0.05)
    elapsed = time.perf_counter() - began
    assert rate.size in (64, 128)
    assert rate.dtype == str(dtype).removeprefix("torch.")
    assert rate.device == "cpu" and rate.num_threads == torch.get_num_threads()
    # no product can have been faster than the rate, nor the best slower than one per call
    assert 2 * 64**3 / elapsed < rate.flops < 1e15


def test_leaves_out_what_would_overrun(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def fake(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, repeats: int) -> float:
        sizes.append(a.shape[0])
        return 2.0 * a.shape[0] ** 3 / 1e7  # a machine of 10 MFLOP/s

    monkeypatch.setattr(gemm, "_seconds", fake)
    rate = measure_gemm(torch.float32, sizes=(32, 64, 1024), budget_s=0.5)
    assert 1024 not in sizes and 64 in sizes  # 1024 would take 215 s
    assert rate.flops == pytest.approx(1e7)


def test_best_size_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {32: 1e9, 64: 5e9, 128: 2e9}

    def fake(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, repeats: int) -> float:
        return 2.0 * a.shape[0] ** 3 / rates[a.shape[0]]

    monkeypatch.setattr(gemm, "_seconds", fake)
    rate = measure_gemm(torch.float32, sizes=tuple(rates))
    assert (rate.size, rate.flops) == (64, pytest.approx(5e9))


def test_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="positive"):
        measure_gemm(budget_s=0)
    with pytest.raises(ValueError, match="positive"):
        measure_gemm(sizes=(0,))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("AMD Instinct MI300X", 1300.0),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(name: str, tflops: float | None) -> None:
    assert peak_bf16_flops(name) == (None if tflops is None else tflops * 1e12)

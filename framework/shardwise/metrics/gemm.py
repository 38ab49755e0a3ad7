"""How fast this machine multiplies matrices: the limit that training is compared with.

On a CPU there is no data sheet worth quoting, so the rate is measured where the training runs:
same process, same threads, same dtype. Where several ranks share a machine, all of them measure
at the same time and the sum of their rates is the machine's.
"""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass

import torch

CPU_SIZES = (1024, 2048, 4096)
CUDA_SIZES = (2048, 4096, 8192)

# Dense bf16 peak in TFLOP/s (fp16 for V100, which has no bf16), by a pattern on the device name.
# The first match counts, so narrower names come first. Sources: pytorch/torchtitan
# torchtitan/tools/utils.py (vendors' data sheets), MegaScale-MoE table 4 for H20 and H800.
_PEAK_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
    (r"H200", 989.0),
    (r"H800", 989.0),
    (r"H100 NVL", 835.0),
    (r"H100 PCIe", 756.0),
    (r"H100", 989.0),
    (r"H20\b", 148.0),
    (r"A100", 312.0),
    (r"MI355X", 2500.0),
    (r"MI300X", 1300.0),
    (r"V100", 125.0),
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s that the data sheet gives a GPU, or None when it is not listed.

    ``device_name`` is what ``torch.cuda.get_device_name()`` answers.
    """
    for pattern, tflops in _PEAK_BF16_TFLOPS:
        if re.search(rf"\b{pattern}", device_name, re.IGNORECASE):
            return tflops * 1e12
    return None


@dataclass(frozen=True)
class GemmRate:
    """The best rate seen: ``flops`` per second at a square product of ``size``."""

    flops: float
    size: int
    dtype: str
    device: str
    num_threads: int
    seconds: float


def _seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, repeats: int) -> float:
    """Wall seconds of one of ``repeats`` products, the device drained before and after."""
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    begin = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return max(time.perf_counter() - begin, 1e-9) / repeats


@torch.no_grad()
def measure_gemm(
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    sizes: tuple[int, ...] | None = None,
    budget_s: float = 1.5,
) -> GemmRate:
    """Best rate of square products in ``dtype`` on this process's threads or GPU.

    Sizes are tried from small to large (default 1024 to 4096, on a GPU 2048 to 8192), each with
    an even share of what is left of ``budget_s``. A size whose one product would overrun the
    budget, judged by the rate seen so far, is left out, so the whole call stays near the budget
    whatever the machine.

    Raises ValueError for an empty ``sizes`` or a budget that is not positive.
    """
    device = torch.device(device)
    sizes = tuple(sorted(sizes or (CUDA_SIZES if device.type == "cuda" else CPU_SIZES)))
    if budget_s <= 0 or sizes[0] < 1:
        raise ValueError(f"sizes and budget_s must be positive, got {sizes} and {budget_s}")
    start = time.perf_counter()
    rate, best_size = 0.0, sizes[0]
    for index, size in enumerate(sizes):
        work = 2.0 * size**3
        left = budget_s - (time.perf_counter() - start)
        if rate and 2 * work / rate > left:
            break
        a = torch.rand(size, size, device=device, dtype=dtype)
        b, out = a.roll(1), torch.empty_like(a)
        first = _seconds(a, b, out, 1)  # also the warm-up: kernels are chosen here
        share = (budget_s - (time.perf_counter() - start)) / (len(sizes) - index)
        times = [first]
        spent = 0.0
        while spent < share and spent + times[-1] <= share and len(times) < 200:
            times.append(_seconds(a, b, out, 4 if device.type == "cuda" else 1))
            spent += times[-1] * (4 if device.type == "cuda" else 1)
        if work / min(times) > rate:
            rate, best_size = work / min(times), size
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return GemmRate(
        flops=rate,
        size=best_size,
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(device),
        num_threads=threads,
        seconds=time.perf_counter() - start,
    )


@functools.cache
def measured_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of this process, measured once; where ranks share a machine, all measure together."""
    return measure_gemm(dtype, device, budget_s=0.5).flops


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

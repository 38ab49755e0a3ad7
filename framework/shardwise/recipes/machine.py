"""The ranks that a recipe is written for: how many, and what each may fill."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from shardwise.errors import UserError
from shardwise.metrics.meters import num_cores, total_memory
from shardwise.precision.policy import multiplies_bf16

GIB = 2**30
# Not seen by the formulas: interpreter and libraries (a GPU: its context), workspace of kernels,
# and what an allocator keeps in pieces. On a CPU 0.6 to 1.0 GB were seen (SmolLM2-135M trained
# whole, by LoRA and by QLoRA).
BASE = {"cpu": 1.0 * GIB, "cuda": 1.0 * GIB}
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Machine:
    """``bytes_a_rank``: memory that stands behind one rank. ``here``: whether it is this machine.

    ``precision`` is what ``engine.precision: auto`` means there.
    """

    device: Literal["cpu", "cuda"]
    ranks: int
    bytes_a_rank: float
    precision: Literal["bf16", "fp32"]
    here: bool
    words: str

    @property
    def budget(self) -> float:
        """Bytes that `shardwise.memory` may ask for on a rank."""
        return max(0.0, USABLE * self.bytes_a_rank - BASE[self.device])

    def with_ranks(self, ranks: int) -> Machine:
        """So many ranks of the same memory."""
        return dataclasses.replace(self, ranks=ranks)


def find_machine(ranks: int | None = None, gpu_memory: float | None = None) -> Machine:
    """This machine for ``ranks`` processes (default: one for each GPU, or one).

    ``gpu_memory``: of each rank in GiB, where they are GPUs of another machine. More ranks than
    this machine has GPUs are taken to be on others like it. Raises UserError for what is no number
    of ranks.
    """
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks {ranks}: at least one")
    if gpu_memory is not None:
        if gpu_memory <= 0:
            raise UserError(f"--gpu-memory {gpu_memory:g}: GiB of each rank, more than 0")
        number = ranks or 1
        words = f"{number} {_gpus(number)} of {gpu_memory:g} GiB each"
        return Machine("cuda", number, gpu_memory * GIB, "bf16", False, words)
    if torch.cuda.is_available():
        return _gpus_here(ranks)
    number, have = ranks or 1, total_memory()
    bf16 = multiplies_bf16(torch.device("cpu"))
    words = (
        f"{number} {'rank' if number == 1 else 'ranks'} on the {num_cores()} CPU cores of this "
        f"machine ({have / GIB:.1f} GiB, {'with' if bf16 else 'no'} bf16 products)"
    )
    return Machine("cpu", number, have / number, "bf16" if bf16 else "fp32", True, words)


def _gpus(number: int) -> str:
    return "GPU" if number == 1 else "GPUs"


def _gpus_here(ranks: int | None) -> Machine:
    there = torch.cuda.device_count()
    number = ranks or there
    used = range(min(number, there))
    least = min(torch.cuda.get_device_properties(i).total_memory for i in used)
    precision: Literal["bf16", "fp32"] = (
        "bf16" if multiplies_bf16(torch.device("cuda", 0)) else "fp32"
    )
    words = (
        f"{number} {_gpus(number)} ({torch.cuda.get_device_name(0)}, {least / GIB:.0f} GiB each)"
    )
    if number > there:
        words += f", {there} of them here"
    return Machine("cuda", number, float(least), precision, number <= there, words)

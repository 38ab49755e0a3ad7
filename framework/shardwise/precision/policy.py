"""Which dtype holds what: declared here, kept by every engine, checked by verify on every rank.

Products run in the compute dtype, of weights rounded to it. Whatever is summed up over time or over
ranks is wide: masters, moments, gradients, reductions (Micikevicius et al. 2018, "Mixed Precision
Training", section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwise.errors import ConfigError
from shardwise.ops.region_shards import RegionShards

# Where a layout rounds to the compute dtype, or sums in it, besides what one process does: by
# function, at how many lines. Partial results are summed in fp32 and rounded once, before they are
# used; whatever else sums over ranks or micro-batches does so in fp32.
ROUNDED = {
    # Activations and their gradients, behind their sum over tp ranks.
    "rounds parallel/regions.py _Enter.backward": 1,
    "rounds parallel/regions.py _Leave.forward": 1,
    "rounds parallel/regions.py _GatherTokens.backward": 1,
    "rounds parallel/regions.py _ScatterTokens.forward": 1,
    # What a ring's ranks merged; probabilities, and their gradients, before a product.
    "rounds parallel/context.py _RingAttention.forward": 1,
    "rounds parallel/context.py _RingAttention.backward": 1,
    "rounds ops/attention_blocks.py _explicit_forward": 1,
    "rounds ops/attention_blocks.py _explicit_backward": 2,
    "sums ops/attention_blocks.py _explicit_backward": 1,
    # What a norm returns, over heads that are cut.
    "rounds parallel/norms.py HeadsNorm.forward": 1,
    # Weights that compute; the gradient of wide logits.
    "rounds parallel/mixed_precision.py ComputeCopies.copies": 1,
    "rounds ops/linear.py _Linear.backward": 1,
    "rounds engines/megatron/names.py Place.write": 1,
    # A bias.
    "sums ops/linear.py linear": 1,
    "sums parallel/tensor.py RowLinear.forward": 1,
    "sums parallel/tensor.py Swapped.multiply": 1,
    # An adapter's part, in the dtype of the product that it is added to; PiSSA's, less another.
    "sums adapters/lora.py LowRank.forward": 2,
    "sums adapters/lora.py LowRankRows.forward": 1,
    "sums adapters/bottleneck.py Bottleneck.beside": 1,
    "sums adapters/bottleneck.py _sequential": 1,
    "sums adapters/bottleneck.py _parallel": 1,
    # Magnitudes over norms, by which rows are multiplied.
    "rounds adapters/lora.py LowRank.forward": 1,
    # DeepSpeed: weights that compute; what it reduced in fp32, written back to where it came from.
    "rounds engines/deepspeed/engine.py DeepSpeedEngine.step": 1,
    "rounds engines/deepspeed/engine.py DeepSpeedEngine.forward_backward": 1,
}

# What an engine tells of itself: for each declared quantity, the dtype of each tensor by name.
Found = Mapping[str, Mapping[str, torch.dtype]]


@dataclasses.dataclass(frozen=True)
class Precision:
    """A row of the policy.

    ``compute``: gathered weights, activations and their gradients. ``master``: the weights that
    updates add to. ``moments``: what an optimizer keeps. ``gradients``: in which a weight's are
    summed over micro-batches. ``reductions``: in which they are summed over data ranks.
    """

    compute: torch.dtype
    master: torch.dtype
    moments: torch.dtype
    gradients: torch.dtype
    reductions: torch.dtype
    loss_scaling: bool = False

    def logits(self, wide: bool = False) -> torch.dtype:
        """Of the head's product; ``wide``: where two computations' probabilities are compared."""
        return torch.float32 if wide and self.compute.itemsize < 4 else self.compute

    def declared(self, wide_logits: bool = False) -> dict[str, torch.dtype]:
        """The dtype of each quantity, by the names that `Found` has."""
        return {
            "compute": self.compute,
            "masters": self.master,
            "moments": self.moments,
            "gradients": self.gradients,
            "reductions": self.reductions,
            "logits": self.logits(wide_logits),
        }


_FP32, _FP64 = (torch.float32,) * 4, (torch.float64,) * 4
PRECISIONS = {
    "fp64": Precision(torch.float64, *_FP64),
    "fp32": Precision(torch.float32, *_FP32),
    "bf16": Precision(torch.bfloat16, *_FP32),
    "fp16": Precision(torch.float16, *_FP32, loss_scaling=True),
}


def dtype_of(tensor: Tensor) -> torch.dtype:
    """That of its memory."""
    return tensor.dtype


def narrowest(tensor: Tensor) -> torch.dtype:
    """The narrowest dtype that holds every value of this rank's part.

    fp32 memory in which all numbers are bf16's has been rounded to bf16. Too few different numbers
    (a fresh norm's ones) tell nothing.
    """
    x = tensor.to_local() if isinstance(tensor, (DTensor, RegionShards)) else tensor
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        if narrow.itemsize < x.dtype.itemsize and torch.equal(x.to(narrow).to(x.dtype), x):
            return narrow if x.unique().numel() >= 16 else x.dtype
    return x.dtype


def narrowest_sum(tensor: Tensor) -> torch.dtype:
    """`narrowest` of a sum of 16-bit terms: a gradient, over micro-batches.

    All of fp16 are multiples of 2^-24, and it has all of those up to 2^-13. So far its sums are its
    own, in whatever they were summed: those elements tell nothing.
    """
    x = tensor.to_local() if isinstance(tensor, (DTensor, RegionShards)) else tensor
    dtype = narrowest(x)
    if dtype == torch.float16:
        return narrowest(x.where(x.abs() > 2.0**-13, 0))
    return dtype


def of_terms(terms: int) -> tuple[Callable[[Tensor], torch.dtype], ...]:
    """What tells the dtypes of moments and of gradients that were summed of so many terms.

    A sum of one term is as narrow as the term.
    """
    return (narrowest, narrowest_sum) if terms > 1 else (dtype_of, dtype_of)


class DtypeCheck:
    """What an engine's `dtypes` told during a run, against what its policy declares.

    Of each tensor the widest dtype counts: a sum of one term is as narrow as the term.
    """

    def __init__(self, declared: Mapping[str, torch.dtype]) -> None:
        self.declared = declared
        self.widest: dict[tuple[str, str], torch.dtype] = {}

    def note(self, found: Found) -> None:
        """Between `forward_backward` and `step`, when gradients are there, at every update."""
        for kind, dtypes in found.items():
            for name, dtype in dtypes.items():
                before = self.widest.get((kind, name), dtype)
                self.widest[kind, name] = max(before, dtype, key=lambda d: d.itemsize)

    def problems(self) -> dict[tuple[str, str], str]:
        """By quantity and tensor, a sentence on what is not as it was declared."""
        return {
            (kind, name): f"it is {str(dtype)[6:]}, declared {str(self.declared[kind])[6:]}"
            for (kind, name), dtype in self.widest.items()
            if dtype != self.declared[kind] and not self._by_chance(kind, dtype)
        }

    def _by_chance(self, kind: str, dtype: torch.dtype) -> bool:
        """A sum of few numbers of one 16-bit dtype may fit the other's grid."""
        compute = self.declared["compute"]
        summed = kind in ("masters", "moments", "gradients")
        return summed and dtype.itemsize == compute.itemsize == 2 and dtype != compute


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 products; without them they are far slower than fp32's.

    An x86 processor needs AVX512-BF16 or AMX (measured on one with AVX2 alone: fp32 products 40
    times as fast as bf16 ones). Other processors are taken at PyTorch's word for fp32, and so is
    a device of which PyTorch does not say.
    """
    if device.type in ("cuda", "xpu"):
        return bool(getattr(torch, device.type).is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def resolve(name: str, device: torch.device) -> str:
    """``auto`` is bf16 where the hardware multiplies it, else fp32; other names stay."""
    if name == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    return name


def precision_of(name: str, device: torch.device) -> Precision:
    """The row of a name; raises ConfigError for an unknown one."""
    row = PRECISIONS.get(resolve(name, device))
    if row is None:
        known = ", ".join(["auto", *PRECISIONS])
        raise ConfigError(f"engine.precision: unknown {name!r}; known: {known}")
    return row

"""Settings of the rotary op, in a module without torch: configs read them."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for contexts longer than the one trained on.

    ``linear``: all by ``factor`` (Chen et al. 2023). ``llama3``: low frequencies only (Llama 3.1
    release). ``yarn``: interpolation by wavelength with a temperature (Peng et al. 2023).
    ``longrope``: each by a factor of its own (Ding et al. 2024), of two lists: which one is decided
    by the context that a model is made for, not by the batch, which layouts cut differently.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_max_seq_len: int = 8192
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: bands begin and end at whole pairs
    mscale: float | None = None  # yarn: of ln(factor) in the temperature,
    mscale_all_dim: float | None = None  # and of the one that divides it
    attention_factor: float | None = None  # yarn, longrope; None: the papers'
    pair_factors: tuple[float, ...] = ()  # longrope


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryGrowth:
    """Queries of position p are multiplied by ``1 + rate * ln(1 + p // period)``.

    It keeps attention as sharp over many keys as over a few (Llama 4 release).
    """

    rate: float
    period: int  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary positions of the first ``width`` features of a head."""

    width: int
    base: float
    scaling: RopeScaling | None = None
    interleaved: bool = False  # features 2i and 2i + 1 are a pair, not those of the two halves

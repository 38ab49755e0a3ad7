"""Settings of the rotary op, in a module without torch: configs read them."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for contexts longer than the one trained on.

    ``linear``: all by ``factor`` (Chen et al. 2023). ``llama3``: low frequencies only (Llama 3.1
    release). ``yarn``: interpolation by wavelength with a temperature (Peng et al. 2023).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_seq_len: int = 8192
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: the paper's 0.1 ln(factor) + 1

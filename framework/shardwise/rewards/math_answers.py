"""Mathematics compared by math-verify, an optional library (``pip install 'shardwise[math]'``).

It reads model text with sympy, which may run long or evaluate what it reads, so it runs only in the
sandbox: see `score`. https://github.com/huggingface/Math-Verify
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

from shardwise.errors import ConfigError


def require() -> None:
    """Raise ConfigError when the library is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "reward of kind 'math' needs the package math-verify: pip install 'shardwise[math]'"
        )


def score(question: str, completion: str, answer: str, meta: Mapping[str, Any]) -> float | None:
    """1 when both texts are the same number, expression, set, tuple or equation.

    A user reward (see `user.py`); the sandbox limits its time. None when the reference cannot be
    read as mathematics.
    """
    import math_verify

    logging.disable()  # it warns of every text that it cannot read
    kinds = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]

    def read(text: str) -> list[Any]:
        text = text.strip().strip("$")
        found = math_verify.parse(f"${text}$", extraction_config=kinds, parsing_timeout=None)
        return [f for f in found if not isinstance(f, str)]

    want = read(answer)
    if not want:
        return None
    return float(math_verify.verify(want, read(completion), timeout_seconds=None))

"""Answers in mathematics, compared in the sandbox."""

from __future__ import annotations

import importlib.util

import pytest

from shardwise.errors import ConfigError
from shardwise.rewards import RewardConfig, RewardItem, build_reward

CASES = [
    (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
    (r"\boxed{1 + x^2}", "x^2+1", 1.0),
    (r"\boxed{2\sqrt{2}}.", r"\sqrt{8}", 1.0),
    (r"\boxed{x = 7}", "7", 1.0),
    (r"\boxed{7 \text{ cm}}", "7", 1.0),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1.0),
    (r"\boxed{50\%}", "0.5", 1.0),
    (r"first \boxed{4}, then \boxed{3}", "4", 0.0),
    (r"first \boxed{4}, then \boxed{3", "4", 0.0),
    (r"\boxed{3 \text{ or } 4}", "4", 0.0),
    (r"\boxed{\sqrt{7}}", "7", 0.0),
    ("it is 4", "4", 0.0),
    (r"\boxed{__import__('os').system('id')}", "4", 0.0),
    (r"\boxed{4}", "", None),
]


def test_mathematics_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    config = RewardConfig.model_validate({"parts": [{"kind": "math"}]})
    with build_reward(config) as scorer:
        found = scorer.score([RewardItem("q", text, want) for text, want, _ in CASES])
        assert scorer.maximum == 1.0
        limits = scorer.sandboxes[0].config
    assert limits.num_workers > 1
    assert limits.seconds_for(2048) == limits.timeout_s * 2048 / limits.num_workers
    for (text, want, value), result in zip(CASES, found, strict=True):
        assert result.value == value, (text, want, result)
    assert "returned None" in found[-1].reason


def test_the_library_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'shardwise\[math\]'"):
        build_reward(RewardConfig.model_validate({"parts": [{"kind": "math"}]}))

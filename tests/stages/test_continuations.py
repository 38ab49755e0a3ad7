"""Free continuations stop where the recipe says, and where the tokenizer does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shardwise.data.tokenizer import ByteTokenizer
from shardwise.rollout.config import Sampling
from shardwise.stages import continuations
from shardwise.stages.served import Served


def test_stops_of_the_user_are_added_to_the_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sampling] = []

    class Generator:
        def update_weights(self, weights: Any) -> None: ...

        def generate(self, requests: Any, sampling: Sampling, key: int) -> Any:
            asked.append(sampling)
            return [SimpleNamespace(token_ids=[65]) for _ in requests]

    served = Served(Generator(), group=0, groups=1, place=0)  # type: ignore[arg-type]
    monkeypatch.setattr(continuations, "serve", lambda *_, **__: served)
    tokenizer = ByteTokenizer()
    ctx: Any = SimpleNamespace(
        tokenizer=tokenizer,
        run=SimpleNamespace(model=None, seed=0),
        device="cpu",
        is_main=True,
        stage=SimpleNamespace(name="s"),
    )
    config: Any = SimpleNamespace(
        prompts=["a"], sampling=Sampling(stop_ids=(10, 256)), name="continuations", rollout=None
    )
    engine: Any = SimpleNamespace(weights=lambda: iter(()))
    [sample] = continuations.evaluate(config, ctx, engine)["samples"]
    assert sample["completion"] == "A"
    assert asked[0].stop_ids == (10, 256, tokenizer.id_of("<|im_end|>"))

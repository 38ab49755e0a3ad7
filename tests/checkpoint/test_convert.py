"""A folder that `convert` writes is complete or not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from shardwise.checkpoint import convert
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from tests.support import toy


def stand_in(breaks: bool) -> convert.OpenModel:
    model = registry.build(toy.llama())
    init_weights(model, 0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from list(model.named_parameters())[: 3 if breaks else None]
        if breaks:
            raise OSError("the source is gone")

    return convert.OpenModel("native", toy.llama(), tensors(), {})


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    out = tmp_path / "deep" / "hf" if not exists else tmp_path / "hf"
    if exists:
        out.mkdir()
    monkeypatch.setattr(convert, "open_model", lambda path, *_: stand_in(breaks=True))
    with pytest.raises(OSError, match="gone"):
        convert.convert("somewhere", out)
    assert out.exists() == exists and list(out.parent.iterdir()) == [out] * exists
    monkeypatch.setattr(convert, "open_model", lambda path, *_: stand_in(breaks=False))
    convert.convert("somewhere", out)
    assert {p.name for p in out.iterdir()} == {"config.json", "hashes.json", "model.safetensors"}
    assert list(out.parent.iterdir()) == [out]

"""What generation holds, against what a generator allocates."""

from __future__ import annotations

import pytest
import torch

from shardwise import memory
from shardwise.config.load import load_config
from shardwise.memory.serving import PAGE, cache, served_weights
from shardwise.parallel.memory_inputs import model_shape
from shardwise.rollout.backends import PlainBackend
from shardwise.rollout.cache import PagedCache
from shardwise.rollout.generator import Generator
from tests.stages.recipes import recipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_cache(tmp_path: object, dtype: torch.dtype) -> None:
    config = recipe(tmp_path / "run", "grpo")  # type: ignore[operator]
    config["model"]["vocab_size"] = 300
    model = load_config(config).config.model
    work = memory.Work(1, 1, compute_bytes=dtype.itemsize, device="cuda")
    shape = model_shape(model)  # type: ignore[arg-type]
    backend = Generator(model, dtype, accelerate=False).backend
    assert isinstance(backend, PlainBackend)
    assert served_weights(shape, work) == sum(p.nbytes for p in backend.model.parameters())
    pages = PagedCache(2, 2, 8, PAGE, dtype=dtype, device="cpu")
    pages.resize(6 * 3)
    assert cache(shape, work, 6, 40) == pages.k.nbytes + pages.v.nbytes

"""What every family promises: packing, caching and batching change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.models.common.cache import SimpleCache
from shardwise.models.common.init import init_weights
from shardwise.models.dense.gpt2 import GPT2Config
from shardwise.models.dense.llama import LlamaConfig
from shardwise.models.registry import build
from shardwise.ops import rng

LLAMA = {"vocab_size": 50, "hidden_size": 32, "num_layers": 3, "num_heads": 4}
LLAMA |= {"num_kv_heads": 2, "ffn_size": 48}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA, dropout=0.2),  # type: ignore[arg-type]
    "windowed": LlamaConfig(**LLAMA, sliding_window=4, window_start_layer=1, qk_norm=True),  # type: ignore[arg-type]
    "gpt2": GPT2Config(
        vocab_size=50,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_seq_len=64,
        embed_dropout=0.1,
        attn_dropout=0.2,
        dropout=0.3,
    ),
}


def _model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    model = build(CONFIGS[name])
    init_weights(model, 0)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(5)  # so that positions and neighbours matter in the logits
    return model.to(dtype)


def _ids(num_rows: int, num_tokens: int) -> Tensor:
    return torch.randint(50, (num_rows, num_tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_separate_ones(name: str) -> None:
    """Logits and gradients: no attention, no positions leak between the documents of a row."""
    model = _model(name)
    lengths = [7, 1, 12]
    ids = _ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = model(ids, positions, segments)
    packed.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    parts = [
        model(i, p) for i, p in zip(ids.split(lengths, 1), positions.split(lengths, 1), strict=True)
    ]
    separate = torch.cat(parts, 1)
    torch.testing.assert_close(packed, separate, atol=1e-12, rtol=1e-12)
    separate.square().sum().backward()
    # Against the largest gradient: that of GPT-2's key bias is zero but for rounding, since a
    # constant added to all scores of a softmax changes nothing.
    largest = max(float(p.grad.norm()) for p in model.parameters())
    for n, p in model.named_parameters():
        assert float((grads[n] - p.grad).norm()) <= 1e-12 * largest, n
    assert not torch.allclose(packed, model(ids, positions), atol=1e-3)  # a leak would be seen


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_in_uneven_pieces_equals_one_pass(name: str) -> None:
    """Rows of different lengths, prefilled with padding, then one and three tokens at a time."""
    model, config = _model(name), CONFIGS[name]
    lengths = torch.tensor([9, 4])
    ids = _ids(2, 20)
    with torch.no_grad():
        whole = model(ids, torch.arange(20).expand(2, -1))
        cache = SimpleCache(
            config.num_layers, 2, config.kv_heads, 20, config.head_width, dtype=torch.float64
        )
        start = torch.zeros(2, dtype=torch.int64)
        for num_new, valid in ((9, lengths), (1, None), (3, None), (1, None)):
            positions = start[:, None] + torch.arange(num_new)
            new = ids.gather(1, positions)
            got = model(new, positions, cache=cache)
            step = valid if valid is not None else torch.full((2,), num_new)
            for b in range(2):
                begin, count = int(start[b]), int(step[b])
                torch.testing.assert_close(
                    got[b, :count], whole[b, begin : begin + count], atol=1e-12, rtol=1e-12
                )
            start = start + step
        with pytest.raises(ValueError, match="larger max_seq_len"):
            model(ids[:, :1], torch.full((2, 1), 20), cache=cache)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_does_not_depend_on_the_batch(name: str) -> None:
    model = _model(name)
    ids, positions = _ids(4, 10), torch.arange(10).expand(4, -1)
    keys = rng.token_keys(0, 3, "s", torch.arange(100, 104), torch.arange(10))
    whole = model(ids, positions, rng_keys_BT=keys)
    rows = [model(ids[i : i + 1], positions[:1], rng_keys_BT=keys[i : i + 1]) for i in (2, 0, 3, 1)]
    torch.testing.assert_close(whole[[2, 0, 3, 1]], torch.cat(rows), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(whole, model(ids, positions), atol=1e-3)
    other = rng.token_keys(0, 4, "s", torch.arange(100, 104), torch.arange(10))
    assert not torch.allclose(whole, model(ids, positions, rng_keys_BT=other), atol=1e-3)


def test_every_dropout_place_draws_its_own_mask() -> None:
    """Layers and places within a layer must not share masks."""
    keys = rng.token_keys(0, 0, "s", torch.arange(1), torch.arange(6))
    from shardwise.ops.dropout import dropout

    masks = [
        dropout(torch.ones(1, 6, 64), 0.5, rng.fold(keys, layer), salt)
        for layer in range(4)
        for salt in range(3)
    ]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.3 < float((a == b).float().mean()) < 0.7


def test_activations_follow_the_weights_and_tables_stay_wide() -> None:
    """bf16 weights give bf16 logits, close to fp32's by what bf16 loses."""
    ids, positions = _ids(2, 30), torch.arange(30).expand(2, -1) + 4000
    expected = _model("llama")(ids, positions).detach()
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.08)):
        got = _model("llama", dtype)(ids, positions).detach()
        assert got.dtype == dtype
        assert float((got.double() - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("name", CONFIGS)
def test_tied_embeddings_are_one_parameter(name: str) -> None:
    model = build(CONFIGS[name])
    assert model.head.weight is model.embed.weight  # type: ignore[union-attr]
    assert "head.weight" not in dict(model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_compile_to_one_graph(name: str) -> None:
    """All layers share a graph for each kind of input, without breaks, and agree with eager."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    model = _model(name, torch.float32)
    ids, positions = _ids(2, 16), torch.arange(16).expand(2, -1)
    segments = (torch.arange(16) // 6).expand(2, -1).contiguous()
    keys = rng.token_keys(0, 0, "s", torch.arange(2), torch.arange(16))
    calls: list[dict[str, Any]] = [
        {},
        {"segment_ids_BT": segments},
        {"segment_ids_BT": segments, "rng_keys_BT": keys},
    ]
    expected = [model(ids, positions, **kwargs) for kwargs in calls]
    dynamo.reset()
    counters.clear()
    for layer in model.layers:
        layer.compile(fullgraph=True)
    for number, (kwargs, eager) in enumerate(zip(calls, expected), 1):
        got = model(ids, positions, **kwargs)
        got.sum().backward()
        torch.testing.assert_close(got, eager, atol=1e-4, rtol=1e-4)
        assert counters["stats"]["unique_graphs"] <= number + (name == "windowed")
    dynamo.reset()

"""Self-checks of the layouts benchmark: the load, the verdict, the measuring, and the formulas."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import layouts as bench
import occupancy
import pytest
import torch
import torch.distributed as dist

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.memory import activations
from shardwise.models.registry import config_class
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from tests.support import toy
from tests.support.daily import daily
from tests.support.families import small
from tests.support.pool import RankPool


def test_a_rejected_ratio_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "layout": "pp2",
        "tokens_per_second": {"pp2": 1.0, bench.ALONE: 1.0},
        "gemm": {"pp2": 1e9, bench.ALONE: 1e9},
        "others": 0.5,
        "load": ["0", "1"],
        "ratio": 1.23,
        "profiles": {},
    }
    bench.report([result | {"quiet": False}], "eager")
    rejected = capsys.readouterr().out
    assert "rejected: busy machine" in rejected and "1.23" not in rejected
    bench.report([result | {"quiet": True}], "eager")
    assert "1.23 (target 0.88: met)" in capsys.readouterr().out


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--turns", "2", "--warmup", "1", "--gemm-s", "0.1", "--profile"]
    tiny = ["--tiny", "--layouts", "dp2.zero1", "pp2", "--precision"]
    results = bench.main([*tiny, "fp32", *short])
    for found in results["speed"]:
        both = {found["layout"], bench.ALONE}
        assert set(found["tokens_per_second"]) == set(found["gemm"]) == both
        assert found["ratio"] > 0 and found["load"]
        # Both sides train the same model on the same tokens.
        assert found["losses"][found["layout"]] == pytest.approx(
            found["losses"][bench.ALONE], rel=1e-2
        )
    for memory in (results["memory"], bench.main([*tiny, "bf16", "--no-speed"])["memory"]):
        assert {r["layout"] for r in memory} == {bench.ALONE, "dp2.zero1", "pp2"}
        assert {r["category"] for r in memory} >= {"master_shards", "buffers"}
        assert not [r for r in memory if abs(r["error"]) > bench.MEMORY_TARGET]
    printed = capsys.readouterr().out
    assert "aten::mm" in printed and "MISSED" not in printed.split("memory by category")[1]


def test_births_see_peaks_not_views() -> None:
    nobody = SimpleNamespace(chunks={}, named=SimpleNamespace(parameters={}, mirror=None))
    old = torch.ones(10_000)
    with occupancy.Births(nobody) as births:  # type: ignore[arg-type]
        a = torch.empty(1000)
        b = torch.empty(500)
        views = [a.view(10, 100), old[1:], old.mul_(2)]
        del a, views
        gc.collect()
        c = torch.empty(800)
        births.alive[b.untyped_storage()._cdata].kind = occupancy.GRADIENT
        del b, c
    assert births.peak(occupancy.BUFFER) == 4 * 1000
    assert births.peak(occupancy.GRADIENT) == 4 * 500
    assert births.peak(occupancy.ACTIVATION) == 0


def step(
    changes: dict[str, Any], layout: str, parts: int, engine: dict[str, Any]
) -> tuple[dict[str, int], dict[str, int], int]:
    """(measured, by the formulas, what of buffers is not known) of one step in micro-batches."""
    sizes = {"hidden_size": 64, "num_layers": 3, "ffn_size": 160, "vocab_size": 512}
    if (family := changes.get("family")) is not None:
        heads = {"num_heads": 4, "num_kv_heads": 2}
        model = config_class(family).model_validate(small(family, **sizes, **heads))
    else:
        model: Any = toy.llama(**sizes | changes)
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    config = NativeConfig.model_validate({"layout": layout, "compile": False} | engine)
    it = NativeEngine(model, config, mesh, seed=3, optimizer=AdamWConfig())
    rows = 8 // it.data_size
    batch = toy.batch(8, tokens=32, vocab=model.vocab_size).map(lambda t: t[:rows])
    batch.loss_mask_BT[:] = True
    batches = batch.split(rows // parts)
    expected = occupancy.formula(it, batches)
    if config.recompute != "none":  # the block that is computed again counts as a buffer there
        expected["activations"] = activations.kept(*occupancy.shapes_of(it, batches))
        del expected["buffers"]
    # When a message leaves is known to one message, with several chunks to three.
    messages = 0 if "pp" not in layout else 1 if len(it.chunks) == 1 else 3
    message = activations.boundary(*occupancy.shapes_of(it, batches))
    # Which tokens are valid: an index each, of no account where a vocabulary is.
    indices = 8 * sum(b.num_tokens for b in batches)
    return occupancy.measure(it, batches), expected, messages * message + indices


ODD = {"vocab_size": 301, "tie_embeddings": False}


@pytest.mark.parametrize(
    ("changes", "layout", "world", "parts", "engine"),
    daily(
        [
            ({}, "dp1.zero0", 1, 2, {"precision": "bf16"}),
            (ODD, "dp1.zero0", 1, 2, {"precision": "bf16"}),
            (ODD, "dp1.zero0", 1, 1, {"precision": "fp32"}),
            ({"vocab_size": 61}, "dp1.zero0", 1, 1, {"precision": "bf16"}),  # no room for logits
            ({}, "dp1.zero0", 1, 1, {"precision": "bf16", "recompute": "selective"}),
            ({}, "dp1.zero0", 1, 1, {"precision": "fp32", "recompute": "full"}),
            (ODD, "dp2.zero0", 2, 1, {"precision": "bf16"}),
            (ODD, "dp2.zero1", 2, 2, {"precision": "bf16"}),
            ({}, "dp2.zero2", 2, 2, {"precision": "fp32"}),
            ({}, "dp2.zero3", 2, 2, {"precision": "bf16"}),
            (ODD, "dp2.zero3", 2, 1, {"precision": "bf16"}),
            ({"num_kv_heads": 1}, "tp2", 2, 1, {"precision": "bf16"}),
            ({}, "tp2.sp", 2, 1, {"precision": "bf16", "recompute": "selective"}),
            (ODD, "pp2.gpipe", 2, 4, {"precision": "bf16"}),
            ({}, "pp2", 2, 8, {"precision": "fp32"}),
            (ODD, "pp2", 2, 8, {"precision": "fp32"}),
            ({"num_layers": 4}, "pp4", 4, 8, {"precision": "bf16"}),
            ({"num_layers": 4}, "pp2.interleaved.v2", 2, 4, {"precision": "bf16"}),
            ({"num_layers": 4}, "pp2.zbv", 2, 4, {"precision": "bf16"}),
            ({}, "cp2", 2, 1, {"precision": "bf16"}),
            ({"num_kv_heads": 1}, "cp2.ulysses", 2, 1, {"precision": "bf16"}),
            ({"qk_norm": True}, "tp2", 2, 1, {"precision": "bf16"}),
            ({}, "tp2", 2, 4, {"precision": "fp32"}),
            (ODD, "tp2.sp", 2, 4, {"precision": "fp32"}),
            ({"family": "gemma2"}, "dp1.zero0", 1, 1, {"precision": "bf16"}),
            ({"family": "gemma2"}, "dp1.zero0", 1, 1, {"precision": "fp32"}),
            ({"family": "gemma3"}, "tp2.sp", 2, 1, {"precision": "bf16"}),
            ({"family": "olmo2"}, "pp2", 2, 4, {"precision": "fp32"}),
            ({"family": "olmo3"}, "tp2", 2, 1, {"precision": "bf16"}),
            ({"family": "cohere"}, "tp2.sp", 2, 1, {"precision": "bf16"}),
            ({"family": "arcee"}, "dp1.zero0", 1, 1, {"precision": "bf16"}),
            ({"family": "gpt_neox"}, "tp2", 2, 1, {"precision": "fp32"}),
        ],
        *range(0, 32, 2),
    ),
)
def test_formulas_describe_the_engine(
    ranks: RankPool,
    changes: dict[str, Any],
    layout: str,
    world: int,
    parts: int,
    engine: dict[str, Any],
) -> None:
    for rank, (found, expected, unknown) in enumerate(
        ranks.run(step, changes, layout, parts, engine, world=world)
    ):
        if abs(found["buffers"] - expected.get("buffers", 0)) <= unknown:
            expected.pop("buffers", None)
        errors = {n: occupancy.error(found[n], e) for n, e in expected.items()}
        wrong = {n: f"{e:+.1%}" for n, e in errors.items() if abs(e) > bench.MEMORY_TARGET}
        assert not wrong, f"rank {rank}: {wrong}"

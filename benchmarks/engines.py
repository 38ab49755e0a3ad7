"""Engines side by side: tokens/s and peak memory of a rank, two single-threaded ranks each.

    python benchmarks/engines.py [--engines native,deepspeed] [--zero 2] [--turns 7] [--shape 25M]

Every engine has ranks of its own, one process tree apart from the others', the same model, batch,
optimizer, clipping and ZeRO stage, in bf16 (fp32 where the processor has no bf16 products). They
take turns; who waits is blocked on a pipe. Step-0 losses must be equal. Building and warm-up are
not counted. Memory is the peak of resident bytes over those before the model was there.

Megatron-core runs on a CPU through a shim, and through PyTorch's attention: its figure here says
nothing of a GPU. Its layout is dpN.zero1 whatever ``--zero`` says, the most that it has.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from common import Memory, profile, table, verdict
from peers.handwritten import Shape

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine, Setup
from shardwise.engines.registry import as_kind, build_engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.metrics.timing import Laps, load
from shardwise.models.dense.llama import LlamaConfig
from shardwise.parallel.layout import parse_layout
from shardwise.verify.pool import RankPool

SHAPES = {
    "tiny": Shape("tiny", 512, 64, 2, 4, 2, 128, 4, 32),
    "25M": Shape("25M", 16384, 512, 6, 8, 4, 1408, 8, 512),
}
MICRO, WARMUP, LR, RANKS = 2, 2, 3e-4, 2
LEAST, MOST_MEMORY = 1.0, 1.03  # of every other engine's speed, and of its memory
HELD: dict[str, Any] = {}  # of a rank: what it keeps between calls


def build(kind: str, shape: Shape, zero: int) -> float:
    """In a rank: the engine, and a first update, whose loss is returned."""
    torch.set_num_threads(1)
    model = LlamaConfig(
        family="llama",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        ffn_size=shape.ffn_size,
        max_seq_len=shape.seq_len,
    )
    stage = min(zero, 1) if kind == "megatron" else zero
    base = NativeConfig(layout=f"dp{RANKS}.zero{stage}", precision="auto", compile=False)
    config = as_kind(base, kind, **({"cpu_shim": True} if kind == "megatron" else {}))
    layout, device = parse_layout(config.layout, RANKS), torch.device("cpu")
    dist.barrier()
    HELD["memory"] = Memory()
    HELD["memory"].reset()
    setup = Setup(model, config, layout, device, 1, "bench", AdamWConfig(lr=LR))
    HELD["engine"], HELD["shape"] = build_engine(setup), shape
    loss = update(0)
    for step in range(1, WARMUP):
        update(step)
    return loss


def update(step: int) -> float:
    """One update of this rank's share of a batch."""
    it: Engine = HELD["engine"]
    loss = it.forward_backward(list(batches(HELD["shape"], step, it.data_rank)), CausalLM())["loss"]
    it.step(LR)
    return loss


def batches(shape: Shape, step: int, rank: int) -> Iterator[MicroBatch]:
    """Micro-batches of random tokens, without padding."""
    noise = torch.Generator().manual_seed(step)
    rows, length = shape.batch, shape.seq_len
    ids = torch.randint(shape.vocab_size, (rows, length + 1), generator=noise)
    whole = MicroBatch(
        input_ids_BT=ids[:, :-1],
        position_ids_BT=torch.arange(length).expand(rows, length),
        targets_BT=ids[:, 1:],
        loss_mask_BT=torch.ones(rows, length, dtype=torch.bool),
        sample_ids_B=torch.arange(rows),
    )
    share = rows // RANKS
    yield from whole.split(share)[rank].split(MICRO)


def timed(step: int) -> float:
    """Seconds of one update, from when all ranks are there."""
    dist.barrier()
    began = time.perf_counter()
    update(step)
    return time.perf_counter() - began


def ended(steps: int) -> tuple[int, str]:
    """Peak bytes of this rank, and where an update's seconds go."""
    peak = HELD["memory"].peak()
    count = iter(range(100, 100 + 2 * steps))
    text = profile(lambda: update(next(count)), steps)
    HELD.pop("engine").close()
    return peak, text


def race(kinds: list[str], shape: Shape, zero: int, turns: int) -> dict[str, Any]:
    """Speeds, memory and profiles by engine."""
    pools = {kind: RankPool() for kind in kinds}
    laps = Laps()
    try:
        losses = {
            k: p.run(build, k, shape, zero, world=RANKS, timeout=600)[0] for k, p in pools.items()
        }
        first = losses[kinds[0]]
        assert all(abs(x - first) < 5e-3 * first for x in losses.values()), losses
        for turn in range(turns):
            for kind, pool in pools.items():
                laps.add(kind, max(pool.run(timed, 10 + turn, world=RANKS, timeout=600)))
        ends = {k: p.run(ended, 2, world=RANKS, timeout=600) for k, p in pools.items()}
    finally:
        for pool in pools.values():
            pool.close()
    tokens = shape.tokens
    return {
        kind: {
            "tokens_per_second": tokens / laps.median(kind),
            "ratio": laps.ratio(kinds[0], kind),
            "spread": statistics.pstdev(laps.seconds[kind]) / laps.median(kind),
            "bytes": max(peak for peak, _ in ends[kind]),
            "profile": ends[kind][0][1],
        }
        for kind in kinds
    }


def report(found: dict[str, Any]) -> str:
    """The first engine against each other one."""
    ours, *others = found
    rows = [
        [k, f"{f['tokens_per_second']:.0f}", f"{f['bytes'] / 2**20:.0f}", f"{f['spread']:.2f}"]
        for k, f in found.items()
    ]
    lines = [table(["engine", "tokens/s", "peak MiB a rank", "spread"], rows), ""]
    for kind in others:
        memory = found[ours]["bytes"] / found[kind]["bytes"]
        lines.append(f"{ours} / {kind}: speed {verdict(found[kind]['ratio'], LEAST)}")
        met = "met" if memory <= MOST_MEMORY else "MISSED"
        lines.append(f"{ours} / {kind}: memory {memory:.2f} (target {MOST_MEMORY:.2f}: {met})")
    lines += [f"\n{kind}, rank 0, one update\n{f['profile']}" for kind, f in found.items()]
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", default="native,deepspeed")
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--shape", choices=SHAPES, default="25M")
    args = parser.parse_args()
    print(f"load {load()}; zero{args.zero}; {RANKS} ranks of one thread; shape {args.shape}")
    print(report(race(args.engines.split(","), SHAPES[args.shape], args.zero, args.turns)))


if __name__ == "__main__":
    main()

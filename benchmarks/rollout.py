"""Generation speed beside transformers' `generate`, on SmolLM2-135M's shape.

    python benchmarks/rollout.py [--weights HF_FOLDER] [--dtypes bf16 fp32]
        [--rows 16 1] [--threads 2] [--stored bf16] [--group]

The same prompts, greedy, a fixed number of new tokens, prefill included, for each number of
sequences at once. transformers runs in each of the settings that its documentation gives for CPUs;
the first is what it does unasked, and the target is said of that. All take turns in one process;
compiling and warm-up (minutes) are not counted. The last setting adds PyTorch's own option of
freezing weights to what transformers documents. Greedy tokens are compared too (bf16 rounds
differently in each implementation, so only fp32 is expected to agree).

Without ``--weights`` the weights are random fp32 numbers, as training leaves them; ``--stored
bf16`` rounds them, as SmolLM2 is published: in fp32, too, we then read half the memory. ``--group``
samples all sequences from one prompt (num_return_sequences), as a GRPO group is; we compute it
once.

The limit is what memory and multiplication allow: each decoding step must read all weights once, at
the rate at which the same threads sum a large buffer, and multiply them with all rows, at the rate
of PyTorch's large products; the prefill must multiply. ``--clock cpu`` counts processor seconds
instead of the wall's: with ``--threads 1`` that compares fairly on a busy machine.

``--demo`` times the rollout of the quickstart's GRPO step instead (a 5M model, 16 prompts with 8
samples of 10 tokens), for which every millisecond of overhead a token counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import clock, table, use_threads, verdict

from shardwise.metrics.timing import Laps, load
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.precision.policy import multiplies_bf16
from shardwise.rollout.config import Sampling
from shardwise.rollout.generator import Generator
from shardwise.rollout.sequences import Request

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TARGETS = {16: 3.0, 1: 1.5}  # by the number of sequences


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    rope_base: float = 1e5
    max_seq_len: int = 2048


@dataclasses.dataclass(frozen=True)
class Setting:
    """How transformers generates."""

    attention: str = "sdpa"
    cache: str | None = None
    compiled: bool = False
    freezing: bool = False  # of the weights, by torch.compile


SMOLLM2 = Shape(49152, 576, 30, 9, 3, 1536)
TINY = Shape(512, 64, 2, 2, 1, 128)
DEMO = Shape(4096, 256, 8, 8, 2, 688)
UNASKED = "dynamic cache"
PEERS = {
    UNASKED: Setting(),
    "dynamic cache, eager attention": Setting("eager"),
    "static cache, torch.compile": Setting("sdpa", "static", True),
    "static cache, torch.compile, freezing": Setting("sdpa", "static", True, True),
}


def hf_folder(shape: Shape, stored: torch.dtype = torch.float32) -> Path:
    """Random weights of a shape, which ``stored`` holds exactly, as a Hugging Face folder."""
    config = registry.config_class("llama")(**dataclasses.asdict(shape))
    model = registry.build(config)
    init_weights(model, 0)
    folder = Path(tempfile.mkdtemp(prefix="shardwise-bench-"))
    rounded = ((name, p.detach().to(stored).float()) for name, p in model.named_parameters())
    registry.to_hf(folder, config, rounded)
    return folder


def peer(
    folder: Path, dtype: torch.dtype, setting: Setting, new: int, group: int
) -> Callable[..., Any]:
    """transformers' `generate` in one setting: prompts (B, T) to new tokens (B, new).

    ``group``: 0, or how many are sampled of each prompt.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=setting.attention
    ).eval()
    model.generation_config.eos_token_id = None  # every row runs to the end
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": bool(group), "pad_token_id": 0}
    if group:
        options |= {"num_return_sequences": group, "top_k": 0}
    if setting.cache:
        options["cache_implementation"] = setting.cache
    if setting.compiled:
        model.forward = torch.compile(model.forward)

    def run(prompts_BT: torch.Tensor) -> torch.Tensor:
        torch._inductor.config.freezing = setting.freezing
        with torch.no_grad():
            mask = torch.ones_like(prompts_BT)
            out = model.generate(prompts_BT, attention_mask=mask, **options)
        return out[:, prompts_BT.shape[1] :]

    return run


def ours(
    folder: Path, dtype: torch.dtype, rows: int, new: int, group: int = 0
) -> tuple[Generator, Any]:
    """Our generator, and the same call as `peer` returns."""
    config, weights = registry.from_hf(folder)
    generator = Generator(config, dtype, max_slots=rows)
    generator.update_weights(weights, hf_names=False)
    sampling = Sampling(greedy=not group, max_new_tokens=new)

    def run(prompts_BT: torch.Tensor) -> torch.Tensor:
        requests = [Request(i, p, group or 1) for i, p in enumerate(prompts_BT.tolist())]
        return torch.tensor([c.token_ids for c in generator.generate(requests, sampling)])

    return generator, run


def bandwidth() -> float:
    """Bytes a second at which these threads read memory, best of five."""
    buffer = torch.ones(1 << 28)  # 1 GiB, far beyond any cache
    seconds = []
    for _ in range(6):
        start = clock.now()
        buffer.sum()
        seconds.append(clock.now() - start)
    return buffer.nbytes / min(seconds[1:])


def products(dtype: torch.dtype) -> float:
    """Operations a second of a large product, best of five."""
    a = torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = clock.now()
        a @ a
        seconds.append(clock.now() - start)
    return 2 * 1024**3 / min(seconds[1:])


def limit_of(
    config: Any, item_bytes: int, rates: tuple[float, float], args: Any, rows: int
) -> float:
    """Tokens a second if nothing but weights were read (first rate) and multiplied (second)."""
    weights = config.spec.matmul_parameters()
    of_prompts = weights - config.vocab_size * config.hidden_size  # their last tokens' alone
    prompts = args.prompt * (1 if args.group else rows)
    prefill = max(weights * item_bytes / rates[0], 2 * of_prompts * prompts / rates[1])
    step = max(weights * item_bytes / rates[0], 2 * weights * rows / rates[1])
    return float(rows * args.new / (prefill + (args.new - 1) * step))


def compare(folder: Path, name: str, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """One dtype and number of sequences: a table, and its figures."""
    dtype = DTYPES[name]
    config, _ = registry.from_hf(folder)
    generator = torch.Generator().manual_seed(1)
    group = rows if args.group else 0
    size = (1 if group else rows, args.prompt)
    prompts = torch.randint(10, config.vocab_size, size, generator=generator)
    engine, run = ours(folder, dtype, rows, args.new, group)
    contestants: dict[str, Callable[..., Any]] = {"shardwise": run}
    for title in args.peers:
        contestants[title] = peer(folder, dtype, PEERS[title], args.new, group)
    found: dict[str, torch.Tensor] = {}
    for title, call in list(contestants.items()):
        try:
            start = time.perf_counter()
            found[title] = call(prompts)
            call(prompts)
            print(f"{name}, {title}: warm after {time.perf_counter() - start:.0f} s", flush=True)
        except Exception as e:  # a peer that cannot run is named, not hidden
            print(f"{title}: does not run here ({type(e).__name__}: {str(e)[:200]})")
            if title == "shardwise":
                raise
            del contestants[title]
    laps = Laps()
    for _ in range(args.repeats):
        for title, call in contestants.items():
            start = clock.now()
            call(prompts)
            laps.add(title, clock.now() - start)
    rates = bandwidth(), max(products(dtype), products(torch.float32))
    narrow = getattr(engine.backend, "narrow", False)
    limit = limit_of(config, 2 if narrow else dtype.itemsize, rates, args, rows)
    total = rows * args.new
    lines, figures = [], {}
    for title in contestants:
        speed = total / laps.median(title)
        # Samples are drawn by other random numbers.
        same = None if group else (found[title] == found["shardwise"]).float().mean().item()
        figures[title] = {"tokens_per_second": speed, "same_tokens": same}
        ratio = f"{laps.ratio('shardwise', title):.2f}"
        lines.append(
            [
                title,
                f"{speed:.0f}",
                f"{speed / limit:.2f}",
                ratio,
                "-" if same is None else f"{same:.3f}",
            ]
        )
    kind = "samples of one prompt" if group else "rows"
    print(f"\n{name}: {rows} {kind}, {args.prompt} prompt and {args.new} new tokens")
    print(
        f"our decoding: {engine.backend_note}; memory {rates[0] / 1e9:.1f} GB/s, products "
        f"{rates[1] / 1e9:.0f} GFLOP/s: {limit:.0f} tokens/s"
    )
    print(table(["", "tokens/s", "of the limit", "we are faster by", "same tokens"], lines))
    result: dict[str, Any] = {
        "dtype": name,
        "rows": rows,
        "group": bool(group),
        "limit_tokens_per_second": limit,
        "speeds": figures,
    }
    if len(contestants) > 1:
        others = [t for t in contestants if t != "shardwise"]
        best = min(others, key=laps.median)
        result |= {"peer": best, "ratio": laps.ratio("shardwise", best)}
        print(f"against its best ({best}): {result['ratio']:.2f}")
        if rows in TARGETS and UNASKED in others:
            told = verdict(laps.ratio("shardwise", UNASKED), TARGETS[rows])
            print(f"against what it does unasked ({UNASKED}): {told}")
    return result


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """The quickstart's rollout, with the native step and without."""
    config = registry.config_class("llama")(**dataclasses.asdict(DEMO))
    model = registry.build(config)
    init_weights(model, 0)
    requests = [Request(i, [(i * 31 + j) % 4000 for j in range(30)], 8) for i in range(16)]
    laps, rows, result = Laps(), [], {}
    calls: dict[str, Callable[[], object]] = {}
    for name in args.dtypes:
        for accelerate in (True, False):
            engine = Generator(config, DTYPES[name], max_slots=128, accelerate=accelerate)
            engine.update_weights(model.named_parameters(), hf_names=False)
            sampling = Sampling(max_new_tokens=10)
            title = f"{name}, {engine.backend_note.split(':')[0]}"
            calls[title] = lambda g=engine, s=sampling: g.generate(requests, s)  # type: ignore[misc]
    for turn in range(args.repeats + 1):
        for title, call in calls.items():
            start = clock.now()
            call()
            if turn:
                laps.add(title, clock.now() - start)
    for title in calls:
        result[title] = laps.median(title)
        rows.append([title, f"{result[title]:.3f}", f"{16 * 8 * 10 / result[title]:.0f}"])
    print(table(["16 prompts x 8 samples x 10 tokens", "seconds", "tokens/s"], rows))
    return result


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--weights", type=Path, help="a Hugging Face folder; default: random")
    known = list(DTYPES) if multiplies_bf16(torch.device("cpu")) else ["fp32"]
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=known)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rows", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--stored", choices=DTYPES, default="fp32", help="of random weights")
    parser.add_argument("--group", action="store_true", help="all rows from one prompt, sampled")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the benchmark")
    parser.add_argument("--demo", action="store_true", help="the quickstart's rollout instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    use_threads(args.threads)
    clock.kind = args.clock
    print(f"threads {args.threads}, clock {args.clock}, load {load()}")
    if args.demo:
        results: Any = demo(args)
    else:
        folder = args.weights or hf_folder(TINY if args.tiny else SMOLLM2, DTYPES[args.stored])
        results = [compare(folder, n, rows, args) for n in args.dtypes for rows in args.rows]
    print(f"load at the end {load()}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    sys.exit(0)


if __name__ == "__main__":
    main()

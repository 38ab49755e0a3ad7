"""Does shardwise run on these GPUs? One command, under eight minutes, one JSON.

    torchrun --nproc-per-node 8 benchmarks/gpu/smoke.py     # or: python benchmarks/gpu/smoke.py
    python benchmarks/gpu/smoke.py --device cpu --dry-run   # the same checks, tiny, anywhere

First, on the first node: `shardwise verify RECIPE --device cuda`, every value of some steps against
one process on the CPU, on the layouts for which there are GPUs; it is ended after three minutes.
Then, on all ranks: all-reduce is right; bf16 training learns under ZeRO 1, 2 and 3, with equal
losses; compiled and eager blocks agree; training resumed from a checkpoint is bitwise the unbroken
one. Measures tokens/s, and model FLOP/s against the GPU's data sheet and its own matrix products.
Exit code 1 if a check fails; several nodes need ``--folder`` on storage that they share.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwise import checkpoint
from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.metrics.flops import FlopsShape, training_flops_per_token
from shardwise.metrics.gemm import measure_gemm, peak_bf16_flops
from shardwise.models.dense.llama import LlamaConfig
from shardwise.parallel import mesh
from shardwise.parallel.layout import parse_layout, world_of

LR = 1e-3
# What is verified, where there are GPUs for it: kernels first, then each way to cut a model.
LAYOUTS = (
    "dp1.zero0",
    "dp2.zero2",
    "tp2.sp",
    "pp2",
    "cp2.ring",
    "dp4.hsdp2.zero3",
    "tp2.sp.pp2",
)
RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
VERIFY_SECONDS = 180.0
# bf16 keeps 8 bits; sums in another order move a loss by less than this share.
LOSS_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Size:
    """The model, and what one rank computes at once."""

    model: LlamaConfig
    rows: int
    seq_len: int
    steps: int  # of each ZeRO run
    timed_steps: int
    numbers: int  # in the all-reduce


def _llama(**sizes: int) -> LlamaConfig:
    return LlamaConfig.model_validate({"family": "llama", **sizes})


FULL = Size(  # 0.45 billion parameters
    _llama(
        vocab_size=32000,
        hidden_size=2048,
        num_layers=8,
        num_heads=16,
        num_kv_heads=8,
        ffn_size=5632,
        max_seq_len=2048,
    ),
    rows=4,
    seq_len=2048,
    steps=8,
    timed_steps=10,
    numbers=1 << 26,
)
TINY = Size(
    _llama(
        vocab_size=128,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=64,
        max_seq_len=32,
    ),
    rows=2,
    seq_len=16,
    steps=4,
    timed_steps=2,
    numbers=1 << 10,
)


def verify(recipe: Path, device: str, layouts: Sequence[str], seconds: float) -> dict[str, Any]:
    """What `shardwise verify` says of a recipe, in a process of its own that knows of no peers."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in ours and "TORCHELASTIC" not in k}
    with tempfile.TemporaryDirectory(prefix="shardwise-smoke-") as folder:
        file = Path(folder) / "verify.json"
        command = [sys.executable, "-m", "shardwise", "verify", recipe, "--device", device]
        command += [word for layout in layouts for word in ("--layout", layout)]
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [*map(str, command), "--json", str(file)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
            )
            code, said = str(done.returncode), done.stdout
        except subprocess.TimeoutExpired as error:
            code, said = f"ended after {seconds:g} s", str(error.stdout or b"", "utf-8", "replace")
        found = json.loads(file.read_text()) if file.exists() else {}
        verdicts = found.get("verdicts", [])
        return {  # what the recipe cannot have is refused, which is no fault of the GPUs
            "passed": bool(verdicts) and all(v["passed"] for v in verdicts),
            "exit_code": code,
            "seconds": round(time.perf_counter() - began, 1),
            "table": said.splitlines(),
            "refused": found.get("refused", {}),
        }


def layouts_for(world: int) -> list[str]:
    """Those of `LAYOUTS` for which there are ranks."""
    return [layout for layout in LAYOUTS if world_of(layout) <= world]


class Smoke:
    """The checks of one rank; ``result`` becomes the JSON, ``failures`` its verdict."""

    def __init__(self, size: Size, device: torch.device, compile: bool, folder: Path) -> None:
        self.size, self.device, self.compile, self.folder = size, device, compile, folder
        self.world = dist.get_world_size()
        self.failures: list[str] = []
        self.result: dict[str, Any] = {}

    def engine(self, zero: int, compile: bool) -> NativeEngine:
        """A fresh engine, always with the same initial weights."""
        layout = f"dp{self.world}.zero{zero}"
        config = NativeConfig(layout=layout, precision="bf16", compile=compile)
        place = mesh.build_mesh(parse_layout(layout, self.world), self.device)
        optimizer = AdamWConfig(lr=LR)
        return NativeEngine(
            self.size.model, config, place, seed=1, stage="smoke", optimizer=optimizer
        )

    def batch(self, engine: NativeEngine, step: int) -> MicroBatch:
        """This rank's rows of random tokens; every fourth step shows the same ones."""
        rows, length = self.size.rows, self.size.seq_len
        generator = torch.Generator().manual_seed(step % 4)
        shape = (rows * self.world, length + 1)
        tokens = torch.randint(self.size.model.vocab_size, shape, generator=generator)
        first = engine.data_rank * rows
        mine = tokens[first : first + rows]
        return MicroBatch(
            input_ids_BT=mine[:, :-1].contiguous(),
            position_ids_BT=torch.arange(length).expand(rows, length),
            targets_BT=mine[:, 1:].contiguous(),
            loss_mask_BT=torch.ones(rows, length, dtype=torch.bool),
            sample_ids_B=torch.arange(first, first + rows),
        )

    def train(self, engine: NativeEngine, steps: range, same_batch: bool = False) -> list[float]:
        """Losses of these steps, two micro-batches each."""
        losses = []
        for step in steps:
            batch = self.batch(engine, 0 if same_batch else step)
            micro = batch.split(max(1, self.size.rows // 2))
            losses.append(engine.forward_backward(micro, CausalLM())["loss"])
            engine.step(LR)
        return losses

    def expect(self, ok: bool, message: str) -> None:
        """Note a failure."""
        if not ok:
            self.failures.append(message)

    # --- the checks -----------------------------------------------------------------------------

    def all_reduce(self) -> None:
        """Sums of rank + 1 are exact, in every dtype that gradients or counts have."""
        wanted = self.world * (self.world + 1) / 2
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
            x = torch.full((self.size.numbers,), dist.get_rank() + 1, dtype=dtype)
            x = x.to(self.device)
            dist.all_reduce(x)
            # bf16 counts exactly up to 256.
            self.expect(bool((x == wanted).all()), f"all_reduce of {dtype} is wrong")
        x = torch.ones(self.size.numbers, device=self.device)
        seconds = self._seconds(lambda: dist.all_reduce(x.fill_(1.0)), 5)
        moved = 2 * (self.world - 1) / self.world * x.numel() * x.element_size()
        self.result["all_reduce_gb_per_s"] = round(moved / seconds / 1e9, 2)

    def zero_stages(self) -> None:
        """Each ZeRO stage learns one batch by heart, all along the same losses."""
        curves = {}
        for zero in (1, 2, 3):
            steps = range(self.size.steps)
            curves[f"zero{zero}"] = self.train(self.engine(zero, False), steps, same_batch=True)
        self.result["losses"] = curves
        self.failures += curve_failures(curves)

    def compiled(self) -> None:
        """Compiled blocks give the eager losses; then the speed of what is compiled."""
        eager = self.result["losses"]["zero1"]
        engine = self.engine(1, self.compile)
        if self.compile:
            losses = self.train(engine, range(self.size.steps), same_batch=True)
            self.failures += curve_failures({"eager": eager, "compiled": losses})
        else:
            self.train(engine, range(2))
        n = self.size.timed_steps
        seconds = self._seconds(lambda: self.train(engine, range(1)), n)
        self._speed(seconds)

    def _speed(self, seconds: float) -> None:
        model = self.size.model
        tokens = self.size.rows * self.size.seq_len * self.world
        shape = FlopsShape(
            num_params=model.spec.matmul_parameters(),
            num_layers=model.num_layers,
            attention_width=model.num_heads * model.head_width,
            seq_len=self.size.seq_len,
        )
        rate = training_flops_per_token(shape) * tokens / seconds / self.world
        gemm = measure_gemm(torch.bfloat16, self.device, budget_s=1.5)
        peak = None
        if self.device.type == "cuda":
            peak = peak_bf16_flops(torch.cuda.get_device_name(self.device))
        self.result |= {
            "compiled": self.compile,
            "parameters": model.num_parameters(),
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds),
            "model_tflops_per_device": round(rate / 1e12, 3),
            "gemm_tflops_per_device": round(gemm.flops / 1e12, 3),
            "fraction_of_gemm": round(rate / gemm.flops, 3),
            "mfu": round(rate / peak, 3) if peak else None,  # None: no data sheet for this device
        }

    def resume(self) -> None:
        """Two steps, a checkpoint, two steps; a fresh engine goes on from there bit for bit."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        unbroken = self.engine(2, False)
        self.train(unbroken, range(2))
        state = unbroken.state_dict()
        path = checkpoint.save(self.folder, 2, state.tensors, {"engine": state.meta})
        wanted = self.train(unbroken, range(2, 4))
        resumed = self.engine(2, False)
        self.train(resumed, range(1))  # other weights than the initial ones, to be overwritten
        meta = checkpoint.load(path, resumed.state_dict().tensors)
        resumed.load_state_dict(meta["engine"])
        losses = self.train(resumed, range(2, 4))
        self.expect(losses == wanted, f"losses after the resume: {losses}, unbroken: {wanted}")
        theirs = resumed.state_dict().tensors
        for name, tensor in unbroken.state_dict().tensors.items():
            same = torch.equal(_local(tensor), _local(theirs[name]))
            self.expect(same, f"{name} differs after the resume")
        self.result["resume_bitwise"] = not any("resume" in f for f in self.failures)
        torch.use_deterministic_algorithms(False)

    def run(self) -> dict[str, Any]:
        """All checks; the failures of all ranks are counted."""
        began = time.perf_counter()
        for check in (self.all_reduce, self.zero_stages, self.compiled, self.resume):
            check()
        count = torch.tensor(float(len(self.failures)), device=self.device)
        dist.all_reduce(count)
        if count and not self.failures:
            self.failures.append("another rank's check failed; see its output")
        return {
            "ok": not self.failures,
            "devices": device_names(self.device),
            "world_size": self.world,
            "backend": dist.get_backend_config(),
            "torch": torch.__version__,
            **self.result,
            "failures": self.failures,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _seconds(self, work: Any, repeats: int) -> float:
        """Mean wall seconds of a call, after one that is not counted; the devices are drained."""
        work()
        self._drain()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self._drain()
        return (time.perf_counter() - began) / repeats

    def _drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier()


def curve_failures(curves: dict[str, list[float]]) -> list[str]:
    """What is wrong with loss curves that should fall, and all alike."""
    failures = []
    (first, wanted), *_ = curves.items()
    for name, losses in curves.items():
        if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
            failures.append(f"{name} does not learn: {losses}")
        if any(abs(a - b) > LOSS_TOLERANCE * abs(b) for a, b in zip(losses, wanted, strict=True)):
            failures.append(f"{name} and {first} disagree: {losses} and {wanted}")
    return failures


def device_names(device: torch.device) -> list[str]:
    """The devices of this node."""
    if device.type == "cpu":
        return [f"cpu, {torch.get_num_threads()} threads"]
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _shared_folder() -> Path:
    """A temporary folder of rank 0, known to all ranks of this node."""
    name = torch.zeros(256, dtype=torch.uint8)
    if dist.get_rank() == 0:
        path = tempfile.mkdtemp(prefix="shardwise-smoke-").encode()
        name[: len(path)] = torch.tensor(list(path), dtype=torch.uint8)
    dist.broadcast(name, 0)  # the process group carries CPU tensors too
    return Path(bytes(name[name > 0].tolist()).decode())


def smoke(
    device_name: str,
    dry_run: bool,
    compile: bool,
    folder: Path | None,
    recipe: Path = RECIPE,
) -> dict[str, Any]:
    """Run everything in this process's world; the process group must exist or be describable."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # bitwise products on GPUs
    device = mesh.pick_device(device_name)
    verified = None
    if os.environ.get("RANK", "0") == "0":  # the others wait for it in the next call
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        layouts = layouts_for(local)[: 2 if dry_run else None]
        verified = verify(recipe, device.type, layouts, VERIFY_SECONDS)
    mesh.init_distributed(device)
    place = folder or _shared_folder()
    try:
        it = Smoke(TINY if dry_run else FULL, device, compile, place)
        if verified is not None:
            it.result["verify"] = verified
            it.expect(verified["passed"], f"verify: {verified['table'][-1:]}")
        return it.run()
    finally:
        if folder is None and dist.get_rank() == 0:
            shutil.rmtree(place, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run, print the JSON on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, for any machine")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="what is verified")
    parser.add_argument("--folder", type=Path, help="for the checkpoint; all ranks must see it")
    options = parser.parse_args(argv)
    result = smoke(
        options.device, options.dry_run, not options.no_compile, options.folder, options.recipe
    )
    rank = dist.get_rank()
    if rank == 0:
        print(json.dumps(result, indent=2))
    elif not result["ok"]:
        print(f"rank {rank}: {result['failures']}", file=sys.stderr)
    mesh.stop()
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""What benchmarks share beside `shardwise.metrics.timing`: tables, the stage around a model."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shardwise.config.run import RunConfig
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.parallel import mesh
from shardwise.stages import registry as _registry  # noqa: F401  (stages register themselves)
from shardwise.stages.base import StageContext


def use_threads(num_threads: int) -> None:
    """Compute with ``num_threads``; helper libraries neither fork nor go online."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    torch.set_num_threads(num_threads)


class Memory:
    """Resident bytes of this process beyond those when this was made, at their peak.

    Make it behind all imports and in front of the model. Linux only.
    """

    def __init__(self) -> None:
        self.baseline = self._read("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Since the last `reset`."""
        return self._read("VmHWM") - self.baseline

    def _read(self, name: str) -> int:
        status = Path("/proc/self/status").read_text()
        [line] = [x for x in status.splitlines() if x.startswith(f"{name}:")]
        return 1024 * int(line.split()[1])


class Clock:
    """Wall seconds, or processor seconds of this process, which neighbours disturb less."""

    kind = "wall"

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.perf_counter() if self.kind == "wall" else time.process_time()


clock = Clock()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain columns; the first is flush left, the others flush right."""
    cells = [[str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        rest = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def verdict(value: float, target: float) -> str:
    """``1.02 (target 0.97: met)``."""
    return f"{value:.2f} (target {target:.2f}: {'met' if value >= target else 'MISSED'})"


def stage_context(
    model: dict[str, Any],
    stage: dict[str, Any],
    tokenizer: Any = None,
    directory: Path | None = None,
    init_from: Path | None = None,
) -> StageContext:
    """The context of a stage on this process alone, as a run would build it."""
    start = {} if init_from is None else {"init_from": init_from}
    run = RunConfig.model_validate({"model": model, "stages": [stage], **start})
    config = run.stages[0]
    device = mesh.pick_device(config.engine.device)
    mesh.init_distributed(device)
    return StageContext(
        run=run,
        stage=config,
        tokenizer=tokenizer or ByteTokenizer(),
        directory=directory or Path(tempfile.mkdtemp(prefix="shardwise-bench-")),
        parent=None,
        logger=None,  # type: ignore[arg-type]  # nothing is logged outside the loop
    )


# A profile's groups: the first whose pattern is found in an operator's name, or in that of an
# operator around it, takes its time.
GROUPS = {
    "cross-entropy": r"_TokenLogprobs|cross_entropy|logsumexp",
    "optimizer": r"^Optimizer\.|_fused_adam|_foreach_norm|_foreach_mul|clip_grad",
    "attention": r"scaled_dot_product|flash_attention|cpu_attention",
    "FSDP and weight copies": r"^FSDP::|c10d::|gloo:|^fsdp::|_foreach_copy_|AccumulateGrad$",
    "matrix products": r"^aten::(mm|addmm|bmm|baddbmm|linear)$|^mkldnn|onednn",
    "norm, rotation, activation, residual": r"cpp_fused|CompiledFunction|Torch-Compiled",
    "embedding": r"embedding",
}


def profile(step: Callable[[], object], repeats: int) -> str:
    """A table of where the seconds of ``step`` go, by `GROUPS`; ``step`` must be warm."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as prof:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        wall = time.perf_counter() - start
    groups: dict[str, float] = {}
    ops: dict[str, dict[str, float]] = {}
    for event in prof.events():
        group = _group_of(event)
        seconds = event.self_cpu_time_total / 1e6
        groups[group] = groups.get(group, 0.0) + seconds
        inside = ops.setdefault(group, {})
        inside[event.name] = inside.get(event.name, 0.0) + seconds
    groups["Python and the rest"] = (
        groups.get("Python and the rest", 0.0) + wall - sum(groups.values())
    )
    rows = []
    for group, seconds in sorted(groups.items(), key=lambda item: -item[1]):
        top = sorted(ops.get(group, {}).items(), key=lambda item: -item[1])[:3]
        most = ", ".join(f"{name[:40]} {1e3 * s / repeats:.1f}" for name, s in top)
        share = f"{seconds / wall:.1%}"
        rows.append([group, f"{1e3 * seconds / repeats:.1f}", share, most])
    return table(["", "ms/step", "share", "most of it (ms)"], rows)


def _group_of(event: Any) -> str:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for group, pattern in GROUPS.items():
        if any(re.search(pattern, name) for name in names):
            return group
    return "Python and the rest"

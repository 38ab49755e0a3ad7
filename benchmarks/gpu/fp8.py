"""How much faster is a training step in FP8 than in bf16, and does it learn alike? One JSON.

    torchrun --nproc-per-node 8 benchmarks/gpu/fp8.py --tp 2     # or: python benchmarks/gpu/fp8.py
    python benchmarks/gpu/fp8.py --device cpu --dry-run          # the same, emulated and tiny

The same model, weights and tokens under bf16 and under each recipe: who computed it (Transformer
Engine, or the emulation and why), the loss curves, which must fall and agree within 5 %, and the
seconds of a step, taken in turn so that a clock that drifts drifts for all. Both sides are eager.
Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.smoke import FULL, LR, TINY, Size, Smoke, device_names

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.parallel import mesh
from shardwise.parallel.layout import parse_layout
from shardwise.precision.fp8 import backend

RECIPES = ("delayed", "current", "block", "mxfp8")
TOLERANCE = 0.05
TINY_FP8 = dataclasses.replace(
    TINY,
    model=TINY.model.model_copy(update={"hidden_size": 256, "ffn_size": 256, "num_kv_heads": 4}),
)


class Comparison(Smoke):
    """bf16 and the recipes side by side, on one rank."""

    def __init__(self, size: Size, device: torch.device, tp: int) -> None:
        super().__init__(size, device, compile=False, folder=Path())
        self.layout = f"dp{self.world // tp}.zero1" + (f".tp{tp}.sp" if tp > 1 else "")

    def quantised(self, recipe: str | None) -> tuple[NativeEngine, str]:
        """A fresh engine, and who computes its products."""
        fp8 = None
        if recipe is not None:
            fp8 = {"recipe": recipe, "first_layers": 0, "sentinel": {"enabled": False}}
        config = NativeConfig.model_validate(
            {"layout": self.layout, "precision": "bf16", "compile": False, "fp8": fp8}
        )
        layout = parse_layout(self.layout, self.world)
        place = mesh.build_mesh(layout, self.device)
        optimizer = AdamWConfig(lr=LR)
        engine = NativeEngine(
            self.size.model, config, place, seed=1, stage="fp8", optimizer=optimizer
        )
        who = "bf16" if fp8 is None else ": ".join(backend(config, layout, self.device))
        return engine, who

    def compare(self, recipes: tuple[str, ...], repeats: int) -> dict[str, Any]:
        """Curves, seconds and their ratios to bf16."""
        names = ("bf16", *recipes)
        engines = {n: self.quantised(None if n == "bf16" else n) for n in names}
        curves = {
            n: self.train(engine, range(self.size.steps), same_batch=True)
            for n, (engine, _) in engines.items()
        }
        for name, losses in curves.items():
            self.expect(losses[-1] < losses[0], f"{name} does not learn: {losses}")
            gaps = [abs(a - b) / b for a, b in zip(losses, curves["bf16"])]
            self.expect(max(gaps) <= TOLERANCE, f"{name} leaves bf16's losses by {max(gaps):.3f}")
        seconds: dict[str, list[float]] = {n: [] for n in names}
        for _ in range(repeats):
            for name, (engine, _) in engines.items():
                self._drain()
                began = time.perf_counter()
                self.train(engine, range(1))
                self._drain()
                seconds[name].append(time.perf_counter() - began)
        medians = {n: statistics.median(s) for n, s in seconds.items()}
        return {
            "ok": not self.failures,
            "devices": device_names(self.device),
            "layout": self.layout,
            "torch": torch.__version__,
            "computed_by": {n: who for n, (_, who) in engines.items()},
            "losses": curves,
            "step_seconds": {n: round(s, 4) for n, s in medians.items()},
            "speed_to_bf16": {n: round(medians["bf16"] / s, 3) for n, s in medians.items()},
            "failures": self.failures,
        }


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run, print the JSON on rank 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, for any machine")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["delayed", "current"])
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    options = parser.parse_args(argv)
    device = mesh.pick_device(options.device)
    mesh.init_distributed(device)
    size = TINY_FP8 if options.dry_run else FULL
    comparison = Comparison(size, device, options.tp)
    result = comparison.compare(tuple(options.recipes), size.timed_steps)
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=2))
    mesh.stop()
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

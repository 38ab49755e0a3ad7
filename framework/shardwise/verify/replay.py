"""A tape played on a layout, in a rank process: everything that can be compared, by name."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.checkpoint.layout import pieces
from shardwise.data.batch import join
from shardwise.engines.native import NativeEngine
from shardwise.losses.logprobs import valid_logprobs
from shardwise.ops import comm, dice
from shardwise.ops.fp8_linear import Seen, listening
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from shardwise.precision.policy import PRECISIONS
from shardwise.rollout.generator import Generator
from shardwise.rollout.sampling import Sampling
from shardwise.rollout.scheduler import Request
from shardwise.rollout.weights import digest
from shardwise.verify.tape import Tape

NEW_TOKENS = 6


@dataclasses.dataclass
class Played:
    """One rank's results. Tensors come from rank 0 alone; other ranks send their digests."""

    values: dict[str, Tensor]
    scales: dict[str, Tensor]  # what this rank scaled by, in FP8; other ranks hold other parts
    digests: dict[str, str]
    boxes: dict[str, list[Any]]  # parameter: the boxes of it that this rank holds
    volumes: list[dict[str, Any]]  # communication of the first update
    checksum: str  # of the weights that generated


def play(
    tape: Tape, layout: str, precision: str, compiled: bool = False, domains: str | None = None
) -> Played:
    """Every rank of the layout calls this; ``precision`` replaces the recipe's.

    ``domains``: with FP8, whose scaling domains one process emulates.
    """
    torch.manual_seed(0)
    [stage] = [s for s in tape.run.stages if s.name == tape.stage]
    fp8 = stage.engine.fp8 and stage.engine.fp8.model_copy(update={"domains": domains})
    updates = {
        "layout": layout,
        "precision": precision,
        "compile": compiled,
        "device": "cpu",
        "fp8": fp8,
    }
    config = stage.engine.model_copy(update=updates)
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    engines = [
        NativeEngine(
            tape.run.model, config, mesh, seed=tape.run.seed, stage=tape.stage, optimizer=optimizer
        )
        for optimizer in tape.optimizers
    ]
    player = _Player(tape, engines)
    player.note_weights("initial")
    for number, call in enumerate(tape.calls):
        player.call(number, call)
    player.note_weights("weight")
    player.note_moments()
    checksum = player.generate(PRECISIONS[precision].compute) if tape.prompts else ""
    digests = {name: digest(value) for name, value in player.values.items()}
    values = player.values if dist.get_rank() == 0 else {}
    volumes = player.volumes or []
    return Played(values, player.scales, digests, player.boxes(), volumes, checksum)


class _Player:
    """Notes values in the order in which they come about: what differs first is nearest the bug.

    Kinds: initial, logprobs, loss, metric, sentinel, gradient, clip norm, weight, moment, generated
    tokens, generated logprobs. Kinds of scales: amax, scale, history.
    """

    def __init__(self, tape: Tape, engines: list[NativeEngine]) -> None:
        self.tape, self.engines = tape, engines
        self.values: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.volumes: list[dict[str, Any]] | None = None

    def note(self, kind: str, name: str, value: Tensor | float) -> None:
        self.values[f"{kind}/{name}"] = torch.as_tensor(value, dtype=torch.float64).clone()

    def note_weights(self, kind: str) -> None:
        for number, engine in enumerate(self.engines):
            for name, value in engine.full("weights"):
                self.note(kind, f"{self.label(number)}{name}", value)

    def note_moments(self) -> None:
        for number, engine in enumerate(self.engines):
            if engine.optimizer is None:
                continue
            some = next(iter(engine.optimizer.state.values()))
            for state in sorted(k for k in some if k != "step"):
                for name, value in engine.full(state):
                    self.note("moment", f"{self.label(number)}{name} {state}", value)

    def label(self, number: int) -> str:
        return f"engine {number} " if len(self.engines) > 1 else ""

    def call(self, number: int, call: Any) -> None:
        engine = self.engines[call.engine]
        where = f"{self.label(call.engine)}call {number + 1}"
        share = len(call.batches) // engine.data_size
        mine = call.batches[engine.data_rank * share : (engine.data_rank + 1) * share]
        same_size = len({b.num_tokens for b in call.batches}) == 1
        # A micro-batch is a scaling domain of its own.
        if engine.mesh.layout.pp == 1 and same_size and engine.fp8 is None:
            # A layout without a pipeline computes few and large micro-batches faster; how many
            # there are may change nothing (design decision 2).
            half = -(-len(mine) // 2)
            mine = [join(mine[:half]), join(mine[half:])] if len(mine) > 1 else mine
        if call.kind == "forward":
            found = engine.forward(mine, valid_logprobs)
            rows = torch.cat([f.double().sum(dim=1) for f in found])
            start = sum(b.num_rows for b in call.batches[: engine.data_rank * share])
            everyone = torch.zeros(sum(b.num_rows for b in call.batches), dtype=torch.float64)
            everyone[start : start + len(rows)] = rows
            self.note("logprobs", where, torch.tensor(engine.sum_over_data(everyone.tolist())))
            return
        with comm.tally() as tally, self.noting_scales(where, engine.data_rank * share):
            metrics = engine.forward_backward(mine, call.loss)
        self.note("loss", where, metrics.pop("loss"))
        for name, value in metrics.items():
            kind = "sentinel" if name.startswith("fp8") else "metric"
            self.note(kind, f"{where} {name}", value)
        if self.volumes is None:
            self.volumes = tally.rows()
            for name, value in engine.full("grads"):
                self.note("gradient", f"{self.label(call.engine)}{name}", value)
        if engine.fp8 is not None:
            for name, value in engine.fp8.tensors():
                self.scales[f"history/{where} {name}"] = value.clone()
        self.note("clip norm", where, engine.step(call.lr))

    def noting_scales(self, where: str, first: int) -> contextlib.AbstractContextManager[None]:
        """Note what every backward pass inside scales by; ``first``: number of a micro-batch."""
        passes: Counter[tuple[str, int]] = Counter()

        def note(seen: Seen) -> None:
            key = (seen.site.path, seen.site.part)
            number = first + passes[key]
            passes[key] += 1
            name = f"{where} {key[0]} micro-batch {number + 1} part {key[1]}"
            self.scales[f"amax/{name}"] = seen.amax_3.clone()
            for operand, scale_inv in seen.scale_inv.items():
                self.scales[f"scale/{name} {operand}"] = scale_inv.float().clone()

        return listening(note)

    def boxes(self) -> dict[str, list[Any]]:
        named = self.engines[0].named.parameters
        return {n: [tuple(p.box) for p in pieces(n, t.data)] for n, t in named.items()}

    def generate(self, dtype: torch.dtype) -> str:
        """Greedy completions from the weights that stream out of the layout."""
        served = torch.float32 if dtype == torch.float64 else dtype
        generator = Generator(self.tape.run.model, served, accelerate=False)
        checksum = generator.load(self.engines[0].weights())
        requests = [Request(i, p, 1) for i, p in enumerate(self.tape.prompts)]
        sampling = Sampling(greedy=True, max_new_tokens=NEW_TOKENS)
        done = generator.generate(requests, sampling, dice.key(0, "verify"))
        ids = list(itertools.chain(*(c.token_ids for c in done)))
        logprobs = list(itertools.chain(*(c.logprobs for c in done)))
        self.note("generated tokens", "greedy", torch.tensor(ids))
        self.note("generated logprobs", "greedy", torch.tensor(logprobs))
        return checksum

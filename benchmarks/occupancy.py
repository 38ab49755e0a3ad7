"""What one training step of an engine occupies, by category, measured on the live tensors.

Allocations are seen operator by operator (`Births`). A storage is of the kind that it ever was in
its life: a gradient if a parameter held it as one, an activation if it was made in a forward pass
and survived it, else a buffer. Masters, optimizer states and gathered copies are walked directly.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwise import memory
from shardwise.data.batch import MicroBatch
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.parallel import data
from shardwise.parallel.memory_inputs import model_shape, place_of

GRADIENT, ACTIVATION, BUFFER = "gradients", "activations", "buffers"


@dataclasses.dataclass
class Life:
    """One storage: when it was made and freed (in operators), and what it was."""

    size: int
    born: int
    died: int | None = None
    kind: str = BUFFER


class Births(TorchDispatchMode):
    """Notes every storage that an operator makes, until it is freed."""

    def __init__(self, engine: NativeEngine) -> None:
        super().__init__()
        self.engine = engine
        self.now = 0
        self.lives: list[Life] = []
        self.alive: dict[int, Life] = {}
        self.exchanged = False
        self.copies = 0  # the most bytes of gathered copies seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.exchanged:  # gloo's thread lets go of a message a moment after it has arrived
            time.sleep(1e-3)
        self.exchanged = func.namespace in ("c10d", "shardwise")
        out = func(*args, **(kwargs or {}))
        self.now += 1
        given = {s._cdata for s in storages(tree_leaves((args, kwargs)))}
        for storage in storages(tree_leaves(out)):
            if storage._cdata not in given and storage._cdata not in self.alive:
                self._note(storage)
        for storage in storages(gradients(self.engine)):
            if storage._cdata in self.alive:
                self.alive[storage._cdata].kind = GRADIENT
        self.copies = max(self.copies, num_bytes(copies(self.engine)))
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, life = storage._cdata, Life(storage.nbytes(), self.now)
        self.lives.append(life)
        self.alive[key] = life
        weakref.finalize(storage, self._died, key, life)

    def _died(self, key: int, life: Life) -> None:
        life.died = self.now
        if self.alive.get(key) is life:
            del self.alive[key]

    def peak(self, kind: str) -> int:
        """The most bytes of a kind at one moment."""
        changes: dict[int, int] = {}
        for life in self.lives:
            if life.kind == kind:
                changes[life.born] = changes.get(life.born, 0) + life.size
                if life.died is not None:  # it lived through the operator at which it was last seen
                    changes[life.died + 1] = changes.get(life.died + 1, 0) - life.size
        most = total = 0
        for moment in sorted(changes):
            total += changes[moment]
            most = max(most, total)
        return most

    def watch_forward(self, chunk: nn.Module) -> list[Any]:
        """Hooks that tell what outlives a forward pass of ``chunk``; returns their handles."""
        began = 0

        def before(*_: Any) -> None:
            nonlocal began
            began = self.now

        def after(_module: Any, _args: Any, output: Tensor) -> None:
            results = {s._cdata for s in storages([output])}  # logits and messages are buffers
            for key, life in self.alive.items():
                if life.born > began and life.kind == BUFFER and key not in results:
                    life.kind = ACTIVATION

        return [chunk.register_forward_pre_hook(before), chunk.register_forward_hook(after)]


def storages(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """The memory behind tensors, DTensors' local part; each once."""
    seen = set()
    for value in values:
        if not isinstance(value, Tensor):
            continue
        local = value._local_tensor if isinstance(value, DTensor) else value
        for part in (local._indices(), local._values()) if local.is_sparse else (local,):
            storage = part.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage


def num_bytes(values: Iterable[Any]) -> int:
    """Bytes of the memory behind tensors."""
    return sum(s.nbytes() for s in storages(values))


def _fsdp_params(engine: NativeEngine) -> Iterator[Any]:
    for chunk in engine.chunks.values():
        for module in data.fsdp_modules(chunk):
            for group in fully_shard.state(module)._fsdp_param_groups:  # type: ignore[attr-defined]
                yield from group.fsdp_params


def _compute_copies(engine: NativeEngine) -> list[Any]:
    found = [getattr(chunk, "compute_copies", None) for chunk in engine.chunks.values()]
    return [c for c in found if c is not None]


def copies(engine: NativeEngine) -> list[Tensor]:
    """Weights in the compute dtype, gathered."""
    gathered = [t for p in _fsdp_params(engine) for t in p.all_gather_outputs]
    return gathered + [t for c in _compute_copies(engine) for t in c.copy_of.values()]


def gradients(engine: NativeEngine) -> list[Tensor | None]:
    """Gradients of masters, of gathered copies, and sums of the latter."""
    mirror = engine.named.mirror
    found = [p.grad for p in engine.named.parameters.values()]
    found += [mirror.grad] if mirror is not None else []
    for p in _fsdp_params(engine):
        unsharded = getattr(p, "_unsharded_param", None)
        found += [p.unsharded_accumulated_grad, unsharded.grad if unsharded is not None else None]
    for c in _compute_copies(engine):
        found += [copy.grad for copy in c.copy_of.values()]
    return found


def measure(engine: NativeEngine, batches: Sequence[MicroBatch]) -> dict[str, int]:
    """Bytes by category of one step, after one that is not looked at."""
    loss = CausalLM()
    engine.forward_backward(batches, loss, 1e-4)
    engine.step(1e-4)
    births = Births(engine)
    handles = [h for chunk in engine.chunks.values() for h in births.watch_forward(chunk)]
    with births:
        engine.forward_backward(batches, loss, 1e-4)
    for handle in handles:
        handle.remove()
    parameters = engine.named.parameters.values()
    mirror = [] if engine.named.mirror is None else [engine.named.mirror]  # a V's tied copy
    assert engine.optimizer is not None
    states = [t for s in engine.optimizer.state.values() for t in s.values()]
    found = {
        "master_shards": num_bytes(p.data for p in [*parameters, *mirror]),
        "compute_copies": births.copies,
        "gradients": num_bytes(p.grad for p in parameters),
        "peak_gradients": births.peak(GRADIENT),
        "optimizer_states": num_bytes(states),
        "activations": births.peak(ACTIVATION),
        "buffers": births.peak(BUFFER),
    }
    engine.step(1e-4)
    return found


def shapes_of(
    engine: NativeEngine, batches: Sequence[MicroBatch]
) -> tuple[memory.ModelShape, memory.Place, memory.Work]:
    """What `shardwise.memory` takes, of this rank and a step of ``batches``."""
    model, mesh = engine.model_config, engine.mesh
    place = place_of(model, mesh.layout, mesh.place["pp"], len(batches))
    rows, tokens = batches[0].input_ids_BT.shape
    work = memory.Work(
        seq_len=tokens,
        micro_batch=rows,
        micro_batches=len(batches),
        compute_bytes=engine.precision.compute.itemsize,
        master_bytes=engine.precision.master.itemsize,
        recompute=engine.config.recompute,
        device=engine.mesh.device.type,  # type: ignore[arg-type]
    )
    return model_shape(model), place, work


def formula(
    engine: NativeEngine, batches: Sequence[MicroBatch], optimizer: str = "adamw"
) -> dict[str, int]:
    """The same bytes by the formulas."""
    return dataclasses.asdict(memory.occupancy(*shapes_of(engine, batches), optimizer))


def error(measured: int, expected: int) -> float:
    """How far the measurement is off, as a fraction of the formula."""
    return measured / expected - 1.0 if expected else float(measured > 0)

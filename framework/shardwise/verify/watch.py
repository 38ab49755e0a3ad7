"""A stage as it runs, watched: its engines' calls, what it says aloud, what it logs.

Nothing here knows a kind of stage. Engines are wrapped, so every call is noted, forward passes of
frozen roles too; what comes from outside is asked for through `StageContext.external`; what a stage
computes between its calls it tells through `StageContext.watch`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from shardwise.adapters.targets import is_adapter
from shardwise.checkpoint.adapted import initial_tensors
from shardwise.config.optimizers import LionConfig, OptimizerConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine, Scaled
from shardwise.errors import CheckFailed
from shardwise.losses.contract import Loss
from shardwise.models.common.config import DecoderConfig
from shardwise.ops import comm
from shardwise.ops.local_shards import local_shards
from shardwise.parallel.full_tensor import local_tensor
from shardwise.precision.loss_scale import DynamicLossScale
from shardwise.precision.policy import DtypeCheck, precision_of
from shardwise.rollout.sequences import CHECKSUMS
from shardwise.stages.base import ACTOR, StageContext, role_of, roles_of
from shardwise.verify import extremes
from shardwise.verify.marks import fill, is_back, ramp
from shardwise.verify.notes import Notes
from shardwise.verify.probe import probing
from shardwise.verify.roundings import Roundings
from shardwise.verify.sent import checked
from shardwise.verify.starts import Start, starts_of, write_adapter, write_models

# Of fp16, at the start. At a run's own 2^16 a product over a whole batch overflows where those of
# micro-batches do not, so which updates are skipped is no figure to compare. It doubles at once.
LOSS_SCALE = 2.0**8
# The update that overflows all the same, in one element: every rank must leave it out.
OVERFLOWING = 2
ABSENT = -8.125  # what stands for a number that is not there

External = dict[str, dict[str, Any]]  # by name and key: what one process was given


class WatchedEngine:
    """An engine whose calls are noted. ``role``: "" where a stage has one model."""

    def __init__(self, inner: Engine, role: str, notes: Notes, dtypes: DtypeCheck) -> None:
        self.inner, self.role, self.notes, self.check = inner, role, notes, dtypes
        self.label = f"{role} " if role else ""
        self.last: tuple[Sequence[MicroBatch], Loss, float | None] | None = None
        self.fresh: Callable[[], Iterator[tuple[str, Tensor]]] | None = None  # of a quantised base
        self.narrow = False  # whether to watch where 16 bits are rounded to
        self.sends_bits = False  # whether what is sent is held against what is held
        self.model: Any = None  # the config of a plain one
        self.ends_extreme = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def where(self) -> str:
        """Of the update in progress."""
        return f"{self.label}update {self.notes.counts[f'{self.role} updates']}"

    def note_tensors(self, kind: str, what: str, ending: str = "", where: str = "") -> None:
        """This rank's parts of the engine's weights, gradients or moments."""
        before = f"{where} " if where else self.label
        for name, tensor in self.inner.held(what):
            self.notes.note_tensor(kind, f"{before}{name}{ending}", tensor)

    def note_loading(self) -> None:
        """What weights become that are given to the engine whole; it has its own again behind."""
        with self._given_back() as own:
            self.inner.load_weights((name, 2 * value + ramp(value)) for name, value in own)
            self.note_tensors("loaded", "weights")

    def note_start(self, start: Start, load: Callable[[Engine], None]) -> None:
        """What weights become that are loaded as at a stage's start, and taken off again."""
        config = self.inner.adapter_config
        with self._given_back():
            if start.parent:
                assert config is not None
                self.inner.adapter_config = config.model_copy(update={"start": "parent"})
            load(self.inner)
            self.inner.adapter_config = config
            self.note_tensors("loaded", "weights", f" from {start.name}")

    @contextlib.contextmanager
    def _given_back(self) -> Iterator[list[tuple[str, Tensor]]]:
        own = [(name, value.clone()) for name, value in self.inner.full("weights")]
        yield own
        if self.fresh is not None:  # what is quantised twice is not what is quantised once
            self.inner.load_weights(self.fresh())
            own = [(name, value) for name, value in own if is_adapter(name)]
        self.inner.load_weights(iter(own))

    def end(self) -> None:
        """What comes last, since weights are others behind it: extreme numbers, and a NaN."""
        if self.ends_extreme and self.last is not None:
            batches, loss, said = extremes.meet(self.inner, self.model, len(self.last[0]))
            for row, value in said:
                self.notes.note("extreme output", f"{self.label}row {row}", value)
            self.last = (batches, loss, self.last[2])
        self._meet_a_nan()

    def _meet_a_nan(self) -> None:
        """The last update once more, with a NaN in an element of its largest gradient.

        In fp64 it is the last, else the first: whoever holds it has the NaN. Every rank must leave
        the update out: weights and moments stay. Weights are others then than before, so
        that whatever computes in their place has to follow.
        """
        notes, inner, named = self.notes, self.inner, self._gradients()
        if self.last is None or not named:  # none is kept
            return
        largest = max(named, key=lambda name: (named[name], name))
        kinds = ("weights", *inner.optimizer_states())
        for name, weight in () if self.ends_extreme else inner.held("weights"):
            for shard in local_shards(name, weight):
                shard.view.mul_(1.25)
        held = [local_tensor(t).clone() for kind in kinds for _, t in inner.held(kind)]
        inner.forward_backward(*self.last)
        self._hold_copies(f"{self.label}last update")
        for name, gradient in inner.held("grads"):
            if self.ends_extreme:
                notes.note_tensor("extreme gradient", f"{self.label}{name}", gradient)
            if name == largest:
                fill(name, gradient, math.nan, last=gradient.dtype == torch.float64)
        norm = inner.step(self.last[2] or 0.0)
        told = inner.broadcast(norm if math.isfinite(norm) else None)
        after = [local_tensor(t) for kind in kinds for _, t in inner.held(kind)]
        moved = not all(map(is_back, held, after))
        notes.note("skipped", f"{self.label}a NaN", float(told is None))
        notes.note("moved", f"{self.label}by a NaN", float(moved))

    def forward_backward(
        self, microbatches: Sequence[MicroBatch], loss: Loss, lr: float | None = None
    ) -> dict[str, float]:
        """See `Engine`."""
        notes, inner = self.notes, self.inner
        notes.count(f"{self.role} updates")
        self.last = (microbatches, loss, lr)
        where = self.where
        self._note_samples(where, microbatches)
        first = max(inner.data_rank, 0) * len(microbatches)
        with (
            comm.tally() as tally,
            inner.watch_scales(self._scales_of(where, first)),
            self._probing(where, microbatches, tally),
            self._rounding(),
        ):
            metrics = inner.forward_backward(microbatches, loss, lr)
        notes.volumes = notes.volumes or tally.rows()
        for name, value in inner.broadcast(metrics).items():
            if name == "loss":
                notes.note("loss", where, value)
            else:
                kind = "sentinel" if name.startswith("fp8") else "metric"
                notes.note(kind, f"{where} {name}", value)
        self._hold_copies(where)
        scale, reduced = inner.loss_scale, _reduction(tally)
        if scale != 1.0:
            notes.scales[f"loss scale/{where}"] = torch.tensor([scale])
        for name, tensor in inner.held("grads"):
            notes.touched[f"gradient/{where} {name}"] = reduced
            notes.note_tensor("gradient", f"{where} {name}", tensor, over=scale)
        self.check.note(inner.dtypes())
        if scale != 1.0 and notes.counts[f"{self.role} updates"] == OVERFLOWING:
            self._overflow()
        for name, value in inner.scales():
            notes.scales[f"history/{where} {name}"] = value.clone()
        return metrics

    def _hold_copies(self, where: str) -> None:
        """What has just computed in a weight's place must be that weight, rounded."""
        weights = dict(self.inner.held("weights"))
        for name, own in self.inner.held("copies"):
            if not torch.equal(local_tensor(own), local_tensor(weights[name]).to(own.dtype)):
                what = f"{str(own.dtype)[6:]} copy of {name}"
                self.notes.problems.append(f"{where}: the {what} that computes is not the weight")

    def _rounding(self) -> contextlib.AbstractContextManager[Any]:
        """Of the first step, where 16 bits are rounded to, if the recipe's precision has them."""
        if not self.narrow or self.notes.step > 1:
            return contextlib.nullcontext()
        return Roundings(self.notes.lines, self.inner.modules())

    def _probing(
        self, where: str, microbatches: Sequence[MicroBatch], tally: comm.Tally
    ) -> contextlib.AbstractContextManager[None]:
        if self.notes.probe != where:
            return contextlib.nullcontext()
        return probing(self.inner, where, microbatches, self.notes, tally)

    def _overflow(self) -> None:
        """Make the last element of the last gradient infinite, on the ranks that have it."""
        final = list(self._gradients())[-1:]
        for name, gradient in self.inner.held("grads"):
            if name in final:
                fill(name, gradient, math.inf, last=True)

    def _gradients(self) -> dict[str, int]:
        """Names of all gradients, on whatever rank, in order; and how many elements they have."""
        notes, before = self.notes, f"gradient/{self.label}update "
        values = notes.values if notes.reference is None else notes.reference.values
        order = list(values) if notes.reference is None else notes.reference.order
        found = (name for name in order if name.startswith(before))
        return {name.rpartition(" ")[2]: values[name].numel() for name in found}

    def _scales_of(self, where: str, first: int) -> Callable[[Scaled], None]:
        """Notes what every backward pass scales by; ``first``: number of a micro-batch."""
        passes: Counter[tuple[str, int]] = Counter()

        def note(scaled: Scaled) -> None:
            key = (scaled.path, scaled.part)
            number = first + passes[key]
            passes[key] += 1
            name = f"{where} {key[0]} micro-batch {number + 1} part {key[1]}"
            self.notes.scales[f"amax/{name}"] = scaled.amax_3.clone()
            for operand, scale_inv in scaled.scale_inv.items():
                self.notes.scales[f"scale/{name} {operand}"] = scale_inv.float().clone()

        return note

    def step(self, lr: float) -> float:
        """See `Engine`."""
        notes, where = self.notes, self.where
        kept = bool(self._gradients())  # else weights had moved before there was a norm
        with self._rounding():
            norm = self.inner.step(lr)
        notes.note("learning rate", where, lr)
        told = self.inner.broadcast(norm if math.isfinite(norm) else None)
        notes.note("skipped", where, float(told is None))
        if told is None:
            number = notes.counts[f"{self.role} updates"] - 1
            notes.skipped.setdefault(self.role or ACTOR, []).append(number)
            notes.forget("gradient", where)
        elif kept:
            notes.note("clip norm", where, told)
        for state in self.inner.optimizer_states():  # weights are made from them
            self.note_tensors("moment", state, f" {state}", where)
        self.note_tensors("weight", "weights", where=where)
        if told is not None and not kept:
            notes.note("clip norm", where, told)
        return norm

    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """See `Engine`; noted row by row, since which rows go together is the layout's affair.

        A function may say by ``compared(values)`` which of them rounding cannot exchange.
        """
        step = f"{self.label}step {self.notes.step}"
        with comm.tally() as tally, self._probing(step, microbatches, tally), self._rounding():
            found = self.inner.forward(microbatches, fn)
        if self.last is None:  # it learns nothing, or has not yet
            self.check.note({"logits": self.inner.dtypes().get("logits", {})})
        for batch, values in zip(microbatches, found, strict=True):
            for row, valid_T in enumerate(batch.loss_mask_BT):
                if not bool(valid_T.any()):
                    continue
                whole = values.shape[:2] == batch.loss_mask_BT.shape
                value = values[row][valid_T.to(values.device)] if whole else values[row]
                value = getattr(fn, "compared", _same)(value)
                what = f"{step} sample {int(batch.sample_ids_B[row])}"
                time = self.notes.count(f"pass {what}")
                self.notes.note("forward pass", f"{what} time {time}", value)
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        what = f"{self.label}step {self.notes.step}"
        time = self.notes.count(f"weights of {what}")
        named = self.inner.weights()
        if self.sends_bits:
            named = checked(self.inner, self.model, self.notes.problems)
        for name, value in named:
            self.notes.note("sent weights", f"{what} time {time} {name}", value)
            yield name, value

    def _note_samples(self, where: str, microbatches: Sequence[MicroBatch]) -> None:
        """Which samples this rank learns from, and what they are."""
        ids = []
        for batch in microbatches:
            for row, valid_T in enumerate(batch.loss_mask_BT):
                if not bool(valid_T.any()):
                    continue
                ids.append(int(batch.sample_ids_B[row]))
                what = f"{where} sample {ids[-1]}"
                self.notes.note("sample", what, _tokens(batch, row, valid_T))
                for name, extra in batch.extras.items():
                    whole = extra.shape[:2] == batch.loss_mask_BT.shape
                    value = extra[row][valid_T] if whole else extra[row]
                    self.notes.note("extra", f"{what} {name}", value)
        if self.inner.data_rank >= 0:
            self.notes.dealt[where] = (self.inner.data_rank, ids)


def _tokens(batch: MicroBatch, row: int, valid_T: Tensor) -> Tensor:
    """A row up to its last valid token: what is read, where, and what is to be predicted."""
    end = int(valid_T.nonzero()[-1]) + 1
    parts = [batch.input_ids_BT, batch.position_ids_BT]
    parts += [] if batch.segment_ids_BT is None else [batch.segment_ids_BT]
    columns = [part[row, :end] for part in parts]
    valid_T = valid_T[:end]
    return torch.stack([*columns, valid_T.long(), batch.targets_BT[row, :end] * valid_T])


def _reduction(tally: comm.Tally) -> str:
    """The collective that last summed something."""
    found = [tally.last[op] for op in ("reduce_scatter", "all_reduce") if op in tally.last]
    return " and ".join(found)


def _same(value: Tensor) -> Tensor:
    return value


def numbers_of(data: Any, checksums: bool = False) -> list[float]:
    """All numbers in plain data, in order; texts by their hashes, but ``checksums``: not at all."""
    if dataclasses.is_dataclass(data):
        own = [(getattr(data, f.name), CHECKSUMS in f.metadata) for f in dataclasses.fields(data)]
        return list(itertools.chain(*itertools.starmap(numbers_of, own)))
    if isinstance(data, Mapping):
        data = list(data.items())
    if isinstance(data, np.ndarray):
        return [float(number) for number in data.flat]
    if isinstance(data, (list, tuple)):
        return list(itertools.chain(*(numbers_of(value, checksums) for value in data)))
    if isinstance(data, str):  # as small as other numbers: bounds are relative
        return [] if checksums else [_digest(data)[0] / 2**32]
    return [ABSENT if data is None else float(data)]


def _digest(question: Any) -> list[float]:
    """Of plain data, as numbers that fp64 holds."""
    text = json.dumps(question, sort_keys=True, default=repr)
    whole = xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))
    return [float(whole >> 32), float(whole & 0xFFFFFFFF)]


@dataclasses.dataclass(frozen=True)
class WatchedContext(StageContext):
    """A stage of which all models start from their initial weights, and all is noted.

    ``given``: what comes from outside, where that is known; ``asked`` collects it. ``resumed``:
    weights will come from a checkpoint. ``loads``: an engine is given other weights first, and
    reads those that it may start from, in ``starts`` (which `writes` them first), each as the
    ``source`` of a stage. ``asks_again``: what comes from outside is computed here too, and
    compared.
    """

    notes: Notes = dataclasses.field(default_factory=Notes)
    given: External | None = None
    asked: External = dataclasses.field(default_factory=dict)
    data_folder: Path = Path()
    resumed: bool = False
    loads: bool = False
    source: Path | None = None
    starts: Path | None = None
    writes: bool = False
    asks_again: bool = False

    @property
    def cache(self) -> Path:
        """Tokenised data is the same for all layouts."""
        return self.data_folder

    def initial_checkpoint(self, role: str) -> Path | None:
        """Nowhere, but while such a start is tried."""
        return self.source

    def model_of(self, role: str) -> DecoderConfig:
        """The run's, with the role's head."""
        assert isinstance(self.run.model, DecoderConfig)
        return self.fitted(self.run.model, role)

    def engine(
        self,
        optimizer: OptimizerConfig | None,
        role: str = ACTOR,
        beside: Engine | None = None,
    ) -> Engine:
        """See `StageContext`."""
        label = role if len(roles_of(self.stage)) > 1 else ""
        precision = precision_of(role_of(self.stage, role).engine.precision, self.device)
        fresh = DtypeCheck(precision.declared(self.stage.exact_logprobs))
        dtypes = self.notes.dtypes.setdefault(label, fresh)
        if isinstance(beside, WatchedEngine):
            beside = beside.inner
        engine = super().engine(optimizer, role, beside)
        engine.start_adapter()
        if precision.loss_scaling and not self.resumed:
            scale = {
                "scale": LOSS_SCALE,
                "good_steps": DynamicLossScale.interval - 1,
                "num_skipped": 0,
            }
            engine.load_state_dict({"updates": 0, "skipped": 0, "loss_scale": scale})
        watched = WatchedEngine(engine, label, self.notes, dtypes)
        config = role_of(self.stage, role).engine
        plain = (
            self.device.type == "cpu"
            and config.fp8 is None
            and not getattr(config, "compile", False)
        )
        watched.narrow = plain and precision.compute.itemsize == 2
        goes_anywhere = isinstance(optimizer, LionConfig)  # where signs are of noise, in fp64 too
        watched.sends_bits = plain and (precision.compute.itemsize < 8 or goes_anywhere)
        watched.model = self.model_of(role)
        watched.ends_extreme = self.asks_again and config.fp8 is None  # else tokens share scales
        if not self.resumed:
            watched.note_tensors("initial", "weights")
        adapter = engine.adapter_config
        if adapter is not None and adapter.quantise is not None:
            model, seed = self.model_of(role), self.run.seed
            watched.fresh = functools.partial(initial_tensors, model, seed)
        if self.loads:
            watched.note_loading()
            if beside is None:  # else it starts with the other role
                self._note_starts(watched, role)
        return watched

    def _note_starts(self, watched: WatchedEngine, role: str) -> None:
        """Everything that a stage may start from, as its role reads it."""
        if self.starts is None:
            return
        own, model = role_of(self.stage, role).engine.precision, self.run.model
        assert isinstance(model, DecoderConfig)
        master = precision_of(own, self.device).master
        folder = self.starts / str(master).rpartition(".")[2]
        if self.writes and not folder.exists():
            write_models(folder, model, master)
        has_adapter = role == ACTOR and watched.inner.adapter_config is not None
        if self.writes and has_adapter and not (folder / "adapter").exists():
            write_adapter(folder, self.model, watched.inner)
        for start in starts_of(folder, role, self.model_of(role), watched.inner):
            there = dataclasses.replace(self, source=start.path)
            watched.note_start(start, functools.partial(there.load_initial_weights, role=role))

    def external(
        self,
        name: str,
        keys: Sequence[str],
        compute: Callable[[], Sequence[Any]],
        *,
        questions: Sequence[Any] | None = None,
        repeatable: bool = False,
    ) -> Sequence[Any]:
        """See `StageContext`."""
        keys = [self._asked(name, f"step {self.notes.step} {key}") for key in keys]
        for key, question in zip(keys, questions or (), strict=questions is not None):
            self.notes.note("question", f"{name} {key}", _digest(question))
        again = repeatable and self.asks_again
        answers = list(compute()) if self.given is None or again else []
        if again:
            for key, answer in zip(keys, answers, strict=True):
                self.notes.note("external", f"{name} {key}", numbers_of(answer))
        if self.given is None:
            kept = copy.deepcopy(answers)
            self.asked.setdefault(name, {}).update(zip(keys, kept, strict=True))
            return answers
        known = self.given.get(name, {})
        if strange := [key for key in keys if key not in known]:
            raise CheckFailed(f"{name} of {strange[0]}: one process never asked for them")
        return [copy.deepcopy(known[key]) for key in keys]

    def _asked(self, name: str, key: str) -> str:
        """A key that tells which time it is asked for: two evaluations number alike."""
        times = self.notes.count(f"{name} {key}")
        return key if times == 1 else f"{key} time {times}"

    def watch(self, name: str, where: str, value: Any) -> None:
        """See `StageContext`."""
        self.notes.note(name, where, value)

"""Sample independence as a law: what a document computes depends on itself alone, to the bit.

The stage's own loop runs on a layout. Of the micro-batches that its engines are given, one document
of every row gets other tokens, all documents in turn. Whatever does not see it (other documents,
other branches, padding) must have the same outputs, and the loss on that alone the same gradients,
bit by bit: zeros add nothing, in whatever order. So no tolerance, and no oracle, is needed.

Who sees whom is written here from its definition (`data.groups`), not asked of the masks. Tokens
of a document cannot show that its positions begin anew; so positions are checked as they are given,
and by shifting those of one document, which its outputs must notice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from shardwise.config.optimizers import OptimizerConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine
from shardwise.losses.contract import Loss
from shardwise.ops.attention import BRANCH_SHIFT
from shardwise.ops.local_shards import local_shards
from shardwise.ops.logits import as_logits
from shardwise.parallel.mesh import pick_device
from shardwise.stages.base import ACTOR, roles_of
from shardwise.verify.compare import Difference
from shardwise.verify.notes import Notes
from shardwise.verify.shrink import STEPS
from shardwise.verify.thresholds import OF_BOTH, lowered
from shardwise.verify.walk import Task, run_stage, stage_of
from shardwise.verify.watch import WatchedContext

# Shape suffixes: B rows, T tokens, t tokens of this rank, W words of this rank.

TOKENS, POSITIONS = "other tokens", "other positions"
_ORDER = ("position", "output", "loss", "gradient")


@dataclasses.dataclass
class Examined:
    """One rank's answers.

    ``leaks``: what changed and must not. ``moved``: by role and kind of change, outputs of what was
    changed itself, which must follow. ``counts``: values compared, by kind.
    """

    leaks: list[Difference] = dataclasses.field(default_factory=list)
    moved: Counter[str] = dataclasses.field(default_factory=Counter)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)


@lowered(OF_BOTH)
def examine(task: Task) -> Examined:
    """Every rank of the layout calls this."""
    torch.manual_seed(0)
    device = pick_device(task.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    examined = Examined()
    watched = functools.partial(_Context, examined=examined)
    notes = Notes()
    run_stage(task, stage_of(task), notes, {}, task.directory, STEPS, watched=watched)
    return examined


def leaks_of(ranks: Sequence[Examined]) -> list[Difference]:
    """Of all ranks, outputs before gradients; then changes that nothing noticed."""
    found = [
        dataclasses.replace(leak, ranks=(rank,))
        for rank, examined in enumerate(ranks)
        for leak in examined.leaks
    ]
    found.sort(key=lambda leak: _ORDER.index(leak.kind))
    moved = sum((examined.moved for examined in ranks), Counter[str]())
    for change in dict.fromkeys(c for examined in ranks for c in examined.moved):
        if not moved[change]:
            why = "they change no output of the document itself: nothing reads them"
            found.append(Difference("document", change, inf, inf, 0.0, why=why))
    return found


@dataclasses.dataclass(frozen=True)
class _Context(WatchedContext):
    """Its engines are asked what depends on what, before they do as the stage says."""

    examined: Examined = dataclasses.field(default_factory=Examined)

    def engine(
        self,
        optimizer: OptimizerConfig | None,
        role: str = ACTOR,
        beside: Engine | None = None,
    ) -> Engine:
        """See `StageContext`; every role has a model of its own."""
        watched: Any = super().engine(optimizer, role)
        label = role if len(roles_of(self.stage)) > 1 else ""
        words = self.model_of(role).vocab_size
        # A position more may be less than what bf16 rounds away.
        shifts = self.precision == "fp64"
        return _Asked(watched.inner, label, words, shifts, self.examined)  # type: ignore[return-value]


class _Asked:
    """An engine of a role, asked at the first call that has several documents in a row.

    ``words``: of its vocabulary. ``shifts``: positions are changed, too.
    """

    def __init__(
        self, inner: Engine, role: str, words: int, shifts: bool, examined: Examined
    ) -> None:
        self.inner, self.words, self.shifts, self.examined = inner, words, shifts, examined
        self.label = f"{role} " if role else ""
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """See `Engine`."""
        if "outputs" not in self.asked:
            self._ask_outputs(_Packed(self.inner, microbatches, self.words))
        return self.inner.forward(microbatches, fn)

    def forward_backward(
        self, microbatches: Sequence[MicroBatch], loss: Loss, lr: float | None = None
    ) -> dict[str, float]:
        """See `Engine`."""
        if "gradients" not in self.asked:
            packed = _Packed(self.inner, microbatches, self.words)
            if "outputs" not in self.asked:
                self._ask_outputs(packed)
            self._ask_gradients(packed, loss)
        return self.inner.forward_backward(microbatches, loss, lr)

    def _ask_outputs(self, packed: _Packed) -> None:
        if not packed.number:
            return
        self.asked.add("outputs")
        self._tell(packed.misplaced())
        before = self.inner.forward(packed.batches, _local)
        changes = packed.changes()
        for change in [*changes, packed.shifted()] if self.shifts else changes:
            after = self.inner.forward(change.batches, _local)
            key = f"{self.label}{change.what}"
            self.examined.moved[key] += 0
            for i, (a_BtW, b_BtW) in enumerate(zip(before, after, strict=True)):
                index_t = self.inner.share_of(packed.batches[i]).tokens_t
                differs_Bt = (a_BtW != b_BtW).any(-1).cpu()  # NaN differs from itself
                sees_Bt = _at(change.sees[i], index_t)
                changed_Bt = _at(change.changed[i], index_t)
                self.examined.moved[key] += int((differs_Bt & changed_Bt).sum())
                self.examined.counts["output"] += int((~sees_Bt).sum())
                wrong = (differs_Bt & ~sees_Bt).nonzero().tolist()
                if wrong:  # the first of a micro-batch tells of all
                    row, place = wrong[0]
                    token = int(index_t[place])
                    error = float((a_BtW[row, place] - b_BtW[row, place]).abs().max())
                    why = f"it changes when {change.told(i, row)}, one token of {len(wrong)}"
                    name = packed.name_of(i, row, token)
                    self._tell([Difference("output", name, inf, error, 0.0, (token,), why=why)])

    def _ask_gradients(self, packed: _Packed, loss: Loss) -> None:
        if not packed.number:
            return
        self.asked.add("gradients")
        for change in packed.changes():
            a_metrics, before = self._gradients(packed.batches, change, loss)
            b_metrics, after = self._gradients(change.batches, change, loss)
            why = f"it changes when {change.told()}, none of which carries loss"
            for name, a in a_metrics.items():
                b = b_metrics.get(name, inf)
                self.examined.counts["loss"] += 1
                if a != b:
                    self._tell([Difference("loss", name, inf, abs(a - b), 0.0, why=why)])
            for name, parts in before.items():
                self.examined.counts["gradient"] += 1
                for (offset, a_N), (_, b_N) in zip(parts, after[name], strict=True):
                    if torch.equal(a_N, b_N):
                        continue
                    gap = (a_N - b_N).abs().nan_to_num(inf)
                    inside = torch.unravel_index(gap.argmax(), gap.shape)
                    worst = tuple(int(i) + o for i, o in zip(inside, offset, strict=True))
                    error = float(gap.max())
                    self._tell([Difference("gradient", name, inf, error, 0.0, worst, why=why)])

    def _gradients(
        self, batches: Sequence[MicroBatch], change: _Change, loss: Loss
    ) -> tuple[dict[str, float], dict[str, list[tuple[tuple[int, ...], Tensor]]]]:
        """Metrics, and this rank's parts of gradients, of the loss on what must notice nothing."""
        engine = self.inner
        alone = [
            dataclasses.replace(b, loss_mask_BT=b.loss_mask_BT & ~sees_BT)
            for b, sees_BT in zip(batches, change.sees, strict=True)
        ]
        meta = engine.state_dict().meta
        metrics = engine.forward_backward(alone, loss, 0.0)
        found = {
            name: [(s.region.offset, s.view.clone()) for s in local_shards(name, tensor)]
            for name, tensor in engine.held("grads")
        }
        engine.step(0.0)  # at this rate it moves no weight
        engine.load_state_dict(meta)  # and for dropout's noise there was no update
        return metrics, found

    def _tell(self, leaks: Iterable[Difference]) -> None:
        named = (dataclasses.replace(leak, name=f"{self.label}{leak.name}") for leak in leaks)
        self.examined.leaks += named


@dataclasses.dataclass(frozen=True)
class _Change:
    """Micro-batches of which a document a row is changed.

    ``changed``: its tokens, ``sees``: those that may notice (bool BT, a micro-batch each).
    ``names``: of the document, by micro-batch and row.
    """

    what: str
    batches: list[MicroBatch]
    changed: list[Tensor]
    sees: list[Tensor]
    names: dict[tuple[int, int], str]

    def told(self, batch: int | None = None, row: int | None = None) -> str:
        """In words; as a row sees it, if one is given."""
        if batch is not None and row is not None:
            ids = self.batches[batch].sample_ids_B
            own = self.names.get((batch, row))
            if own is not None:
                return f"{own} of sample {int(ids[row])} has {self.what}"
            return f"documents of other rows have {self.what}"
        said = [
            f"{name} of sample {int(self.batches[i].sample_ids_B[r])}"
            for (i, r), name in self.names.items()
        ]
        return f"{', '.join(said) or 'documents of other data ranks'} have {self.what}"


class _Packed:
    """A rank's micro-batches of one call, and how often a document of them can be changed.

    ``number`` is the same on every rank of the engine, 0 where no row anywhere holds several
    documents that learn.
    """

    def __init__(self, engine: Engine, batches: Sequence[MicroBatch], words: int) -> None:
        self.batches, self.words = list(batches), words
        self.units = {
            (i, row): _units(batch.segment_ids_BT[row], batch.loss_mask_BT[row])
            for i, batch in enumerate(batches)
            if batch.segment_ids_BT is not None
            for row in range(batch.num_rows)
        }
        number = max(map(len, self.units.values()), default=0)
        by_rank = [0.0] * engine.data_size
        if engine.data_rank >= 0:
            by_rank[engine.data_rank] = float(number)
        self.number = int(max(engine.sum_over_data(by_rank)))

    def changes(self) -> Iterator[_Change]:
        """All documents in turn, one a row."""
        for number in range(self.number):
            yield self._change(
                TOKENS, {k: u[number] for k, u in self.units.items() if number < len(u)}
            )

    def shifted(self) -> _Change:
        """The longest document of every row begins a position later."""
        longest = {}
        for (i, row), units in self.units.items():
            segments_T = self._segments(i, row)
            sizes = [int((segments_T == unit).sum()) for unit in units]
            if sizes:
                longest[i, row] = units[sizes.index(max(sizes))]
        return self._change(POSITIONS, longest)

    def _segments(self, batch: int, row: int) -> Tensor:
        segments_BT = self.batches[batch].segment_ids_BT
        assert segments_BT is not None
        return segments_BT[row]

    def _change(self, what: str, units: dict[tuple[int, int], int]) -> _Change:
        batches, changed, sees = [], [], []
        for i, batch in enumerate(self.batches):
            changed_BT = torch.zeros_like(batch.loss_mask_BT)
            sees_BT = torch.zeros_like(batch.loss_mask_BT)
            for row in range(batch.num_rows):
                if (i, row) in units:
                    segments_T, unit = self._segments(i, row), units[i, row]
                    changed_BT[row], sees_BT[row] = segments_T == unit, _sees(segments_T, unit)
            ids_BT, positions_BT = batch.input_ids_BT, batch.position_ids_BT
            if what == TOKENS:
                index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
                ids_BT = torch.where(
                    changed_BT, (ids_BT + 1 + index_T * 37 % (self.words - 1)) % self.words, ids_BT
                )
            else:
                positions_BT = positions_BT + changed_BT.long()
            batches.append(
                dataclasses.replace(batch, input_ids_BT=ids_BT, position_ids_BT=positions_BT)
            )
            changed.append(changed_BT.cpu())
            sees.append(sees_BT)
        return _Change(what, batches, changed, sees, {k: _named(u) for k, u in units.items()})

    def misplaced(self) -> Iterator[Difference]:
        """Documents with loss whose positions do not begin at 0, branches at their trunk's end."""
        for i, row in self.units:
            batch, segments_T = self.batches[i], self._segments(i, row)
            for unit in segments_T[batch.loss_mask_BT[row]].unique().tolist():
                document, branch = _parts(unit)
                first = int((segments_T == document).sum()) if branch else 0
                index_N = (segments_T == unit).nonzero()[:, 0]
                given_N = batch.position_ids_BT[row, index_N]
                wrong_N = given_N != first + torch.arange(len(index_N), device=given_N.device)
                if bool(wrong_N.any()):
                    at = int(wrong_N.nonzero()[0])
                    token, name = int(index_N[at]), self.name_of(i, row, int(index_N[at]))
                    why = f"its position is {int(given_N[at])}, not {first + at}"
                    yield Difference("position", name, inf, inf, 0.0, (token,), why=why)

    def name_of(self, batch: int, row: int, token: int) -> str:
        """Of the document that a token belongs to; behind the row is what a layout fills up."""
        sample = int(self.batches[batch].sample_ids_B[row])
        segments_BT = self.batches[batch].segment_ids_BT
        if segments_BT is None or token >= segments_BT.shape[1]:
            what = "padding of the layout's" if segments_BT is not None else "row"
            return f"{what} of sample {sample}"
        return f"{_named(int(segments_BT[row, token]))} of sample {sample}"


def _units(segments_T: Tensor, valid_T: Tensor) -> list[int]:
    """Segments that some learning token does not see, if several learn."""
    learning = segments_T[valid_T].unique()
    if len(learning) < 2:
        return []
    return [s for s in segments_T.unique().tolist() if not bool(_sees(learning, s).all())]


def _parts(segment: int) -> tuple[int, int]:
    """Document and branch; the trunk is branch 0."""
    return segment & ((1 << BRANCH_SHIFT) - 1), segment >> BRANCH_SHIFT


def _sees(segments: Tensor, unit: int) -> Tensor:
    """Which segments may attend to ``unit``: itself, and of a trunk its branches."""
    document, branch = _parts(unit)
    same = (segments & ((1 << BRANCH_SHIFT) - 1)) == document
    return same if branch == 0 else segments == unit


def _named(segment: int) -> str:
    document, branch = _parts(segment)
    return f"branch {branch} of document {document}" if branch else f"document {document}"


def _local(outputs: Any, batch: MicroBatch) -> Tensor:
    """What this rank has of a model's outputs, untouched (BtW)."""
    return as_logits(outputs).local


def _at(x_BT: Tensor, index_t: Tensor) -> Tensor:
    """This rank's tokens of a mask; what a layout fills up is in none."""
    found = torch.zeros(x_BT.shape[0], len(index_t), dtype=torch.bool)
    inside_t = index_t < x_BT.shape[1]
    found[:, inside_t] = x_BT.cpu()[:, index_t[inside_t]]
    return found

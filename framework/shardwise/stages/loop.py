"""The loop that every stage runs in: resume, train, watch, validate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardwise import checkpoint
from shardwise.checkpoint import adapted
from shardwise.checkpoint.ranks import Ranks
from shardwise.config.export import resolved_yaml
from shardwise.engines.base import State
from shardwise.errors import CheckpointError, DivergedError
from shardwise.metrics.flops import FlopsShape, training_flops_per_token
from shardwise.metrics.meters import Throughput
from shardwise.metrics.progress import Progress
from shardwise.optim.schedules import lr_factor
from shardwise.resilience.gate import Gate, Point
from shardwise.stages.base import Stage, StageContext, checkpoint_root
from shardwise.stages.callbacks import Callback, Figures, Log, Meters, Show, SkipGuard
from shardwise.stages.lineage import Lineage, check_lineage
from shardwise.stages.registry import build_callbacks
from shardwise.stages.taken_over import take_over
from shardwise.stages.tokenizer_folder import TOKENIZER_FOLDER
from shardwise.stages.trace import TRACED_STEP, trace_step

# Tensors that nothing but an optimizer's step changes.
_UPDATED_ONLY = ("model.", "optim.")


def last_good(root: Path) -> str:
    """Which checkpoint a run that broke can go on from, in words."""
    newest = checkpoint.latest(root)
    if newest is None:
        return "no checkpoint was saved before"
    return f"the last good checkpoint is {newest}; the same command goes on from it"


class Loop:
    """Runs one stage from where its newest checkpoint stands to its last step."""

    def __init__(
        self,
        ctx: StageContext,
        stage: Stage,
        lineage: Lineage,
        progress: Progress,
        gemm: float | None = None,
        gate: Gate | None = None,
    ) -> None:
        """``gate``: of a run that may be told to stop."""
        self.ctx, self.stage, self.lineage, self.progress = ctx, stage, lineage, progress
        self.gate = gate or Gate()
        self.config = ctx.stage
        self.root = checkpoint_root(ctx.directory, self.config.name)
        # A step that also generates multiplies far more than training its tokens takes.
        # Of a model that is trained in part, they depend on where the parts are.
        trains_only = not self.config.on_policy and self.config.freeze is None
        adapts, length = self.config.adapter is not None, self.config.batch.seq_len
        flops = flops_per_token(ctx.model, length, adapts=adapts) if trains_only else None
        self.meter = Throughput(flops, gemm)
        keep = self.config.checkpoint.keep
        behind = self.config.checkpoint.asynchronous
        self.best = self.config.best() if self.config.checkpoint.keep_best else None
        self.lower = self.best is None or self.best.better == "lower"
        later = functools.partial(checkpoint.AsyncSaver, keep=keep, lower_is_better=self.lower)
        self.saver = later(self.root) if behind else None
        self.seconds = 0.0
        self.tokens = 0.0
        self.elapsed, self.steady = 0.0, False  # of the last step; whether it tells of the speed
        self.copied = copied_files(ctx)  # once: whoever removes a folder later harms nothing
        self.newest = Figures(ctx)
        self.callbacks: list[Callback] = [
            *(SkipGuard(), Meters(self.meter), self.newest, Log(), Show(progress)),
            *build_callbacks(ctx),
        ]
        # Groups are made by all ranks at once, so not when a signal comes.
        self.ranks = Ranks.of(None, background=True)
        self.sent = self.saved = -1  # the steps last given to the saver, and last made durable
        self.pending = False  # what is gone on from was not validated yet

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """What makes a checkpoint complete; made with the first, and the same in all."""
        return self.copied | described(self.ctx)

    @property
    def figures(self) -> dict[str, float]:
        """What the end of the stage is told by, besides its evaluations: the newest values."""
        return self.newest.values

    def last_good(self) -> str:
        """See `last_good`, of this stage."""
        return last_good(self.root)

    def tell(self, done: int, kind: str, text: str) -> None:
        """Something happened at a step: every callback hears of it."""
        for callback in self.callbacks:
            callback.event(self, done, kind, text)

    def run(self) -> Path:
        """Train to the end; returns the last checkpoint."""
        try:
            return self._run()
        except BaseException as error:
            for callback in self.callbacks:
                callback.error(self, error)
            raise

    def _run(self) -> Path:
        has_adapter = self.config.adapter is not None
        if has_adapter:  # a checkpoint holds the adapter alone
            self.ctx.load_initial_weights(self.stage.engine)
        start = self._resume()
        if start is None:
            if not has_adapter:
                self.ctx.load_initial_weights(self.stage.engine)
            start = take_over(self.stage.engine, self.ctx.run, self.config)
            self.pending = self.config.validation.at_start
            self.ctx.logger.rewind(self.config.name, -1)
        else:
            self.ctx.logger.rewind(self.config.name, start)
        self.gate.stage(start, self._point(start, durable=True, pending=self.pending))
        for callback in self.callbacks:
            callback.start(self, start)
        if self.pending:
            self._conclude(start, {})
        for step in range(start, self.config.steps):
            self.gate.step()
            for callback in self.callbacks:
                callback.before_step(self, step)
            began = time.perf_counter()
            metrics = self._train_step(step)
            elapsed = time.perf_counter() - began
            steady = step > start and not self._traced(step)
            self._after_step(step + 1, metrics, elapsed, steady)
        if self.saver:
            with self._only_finite():
                self.saver.close()
        for callback in self.callbacks:
            callback.end(self)
        newest = checkpoint.latest(self.root)
        assert newest is not None
        return newest

    def _train_step(self, step: int) -> dict[str, float]:
        lr = self.config.optimizer.lr * lr_factor(self.config.schedule, step, self.config.steps)
        traced = trace_step(self.ctx, self.progress) if self._traced(step) else None
        try:
            with traced or contextlib.nullcontext():
                metrics = {"lr": lr} | self.stage.train_step(step, lr)
        finally:  # also what ends the run
            for kind, text in (*self.stage.engine.events(), *self.stage.events()):
                self.tell(step + 1, kind, text)
        return metrics

    def _traced(self, step: int) -> bool:
        """Whether this is the step that the profiler watches."""
        return self.ctx.run.logging.trace and step == min(TRACED_STEP, self.config.steps - 1)

    def _after_step(
        self, done: int, metrics: dict[str, float], elapsed: float, steady: bool
    ) -> None:
        """Tell of it, validate and save, as the config asks; ``done`` steps are complete."""
        last = done == self.config.steps
        self.seconds += elapsed
        self.tokens += metrics.get("tokens", 0.0)
        self.elapsed, self.steady = elapsed, steady
        for callback in self.callbacks:
            callback.after_step(self, done, metrics)
        due = last or any(
            _due(done, every)
            for every in (self.config.validation.every, self.config.checkpoint.every)
        )
        self.gate.completed(done, self._point(done, pending=due))
        if due:
            self._conclude(done, metrics)

    def _conclude(self, done: int, metrics: dict[str, float]) -> None:
        """Validate and save where it is due. What is cut before is done by whoever goes on."""
        last = done == self.config.steps
        validated: dict[str, float] = {}
        if last or not done or _due(done, self.config.validation.every):
            self.gate.validating()
            validated = self.stage.validate()
        with self.gate.concluding(lambda: self._point(done, durable=self.saved == done)):
            for callback in self.callbacks if validated else ():
                callback.after_validation(self, done, validated, metrics)
            if last or _due(done, self.config.checkpoint.every):
                self._save(done, validated)

    # --- checkpoints ----------------------------------------------------------------------------

    def _point(self, done: int, *, durable: bool = False, pending: bool = False) -> Point:
        """What a run that is cut after ``done`` steps goes on from; its tensors are live."""
        state = stage_state(self.stage)
        # What a forward pass may change (scales of quantised products) as it is now.
        roles = ("", *(f"{role}." for role in self.stage.others()))
        updated = tuple(role + kind for role in roles for kind in _UPDATED_ONLY)
        tensors = {n: t if n.startswith(updated) else t.clone() for n, t in state.tensors.items()}
        meta = json.loads(json.dumps(self._meta(done, state) | {"pending": pending}))

        nonfinite = state.nonfinite

        def save() -> Path:
            """From the thread that stops the run, once the saver's own thread is idle."""
            if self.saver:
                with contextlib.suppress(Exception):  # logged; it is tried again here
                    self.saver.wait()
                if self.ranks.share(self.sent == done and done in checkpoint.list_steps(self.root)):
                    return self.root
            with self.ranks.together():
                self.ctx.logger.sync()
            options: dict[str, Any] = {"nonfinite": nonfinite, "group": self.ranks.group}
            options["keep"] = self.config.checkpoint.keep
            return checkpoint.save(self.root, done, tensors, meta, self.files, **options)

        return Point(self.config.name, done, save, durable)

    def _meta(self, done: int, state: State) -> dict[str, Any]:
        return {
            "stage": self.config.name,
            "kind": self.config.kind,
            "steps": self.config.steps,
            "finished": done == self.config.steps,
            "lineage": dataclasses.asdict(self.lineage),
            **state.meta,
            "layout": str(self.ctx.layout),
            "seconds": self.seconds,
            "tokens": self.tokens,
            "steady": [self.meter.num_tokens, self.meter.seconds],
            "figures": self.figures,
        }

    def _save(self, done: int, validated: dict[str, float]) -> None:
        state = stage_state(self.stage)
        meta = self._meta(done, state)
        files = self.files
        metric = None if self.best is None else validated.get(self.best.name)
        options: dict[str, Any] = {"metric": metric, "nonfinite": state.nonfinite}
        try:
            with Ranks.of(None).together():
                self.ctx.logger.sync()
            with self._only_finite():
                if self.saver:
                    self.saver.save(done, state.tensors, meta, files, **options)
                    self.sent = done
                else:
                    options |= {"keep": self.config.checkpoint.keep, "lower_is_better": self.lower}
                    checkpoint.save(self.root, done, state.tensors, meta, files, **options)
                    self.saved = done
            for callback in self.callbacks:
                callback.after_checkpoint(self, done)
        except CheckpointError as error:
            # A full disk must not cost the run: the previous checkpoint is intact. All ranks fail
            # alike. Only the last one has to succeed.
            if done == self.config.steps or isinstance(error, checkpoint.PeerLostError):
                raise
            self.ctx.logger.note("checkpoint_failed", str(error), self.config.name, done)
            self.progress.message(f"checkpoint of step {done} failed, training goes on: {error}")

    @contextlib.contextmanager
    def _only_finite(self) -> Iterator[None]:
        """Weights that are not finite end the run, on all ranks alike: no later step mends them."""
        try:
            yield
        except checkpoint.NonFiniteError as error:
            raise DivergedError(
                f"stage {self.config.name}: {error}; nothing was saved, {last_good(self.root)}. "
                "If it happens again at the same step, lower optimizer.lr or look at its samples"
            ) from error

    def _resume(self) -> int | None:
        """Load the newest checkpoint of this stage; returns its step, None if there is none."""
        state = stage_state(self.stage)
        newest = checkpoint.latest(self.root)
        found = checkpoint.load_latest(self.root, state.tensors, nonfinite=state.nonfinite)
        if found is None:
            return None
        meta = found.meta
        ctx = self.ctx
        check_lineage(
            ctx.run, self.config, ctx.tokenizer.hash, meta["lineage"], self.lineage, found.path
        )
        self.stage.engine.load_state_dict(meta["engine"])
        for role, engine in self.stage.others().items():
            engine.load_state_dict(meta["roles"][role])
        # "carried": as runs before the key got its name stored it.
        self.stage.load_state_dict(meta["state"] if "state" in meta else meta["carried"])
        self.seconds, self.tokens = meta["seconds"], meta["tokens"]
        # The stage's own speed is over all its steady steps, whoever ran them.
        self.meter.num_tokens, self.meter.seconds = meta.get("steady", [0, 0.0])
        self.newest.values = meta.get("figures", {})
        if found.path != newest:
            words = f"{newest} cannot be used; went back to {found.path.name}"
            self.ctx.logger.note("fell_back", words, self.config.name, found.step)
            self.progress.message(f"{self.config.name}: {words}")
        self.pending = bool(meta.get("pending"))
        self._say_length(int(found.step), meta.get("steps", self.config.steps))
        if found.step < self.config.steps:
            self.ctx.logger.note(
                "resumed", f"continued from {found.path.name}", self.config.name, found.step
            )
        return int(found.step)

    def _say_length(self, done: int, before: int) -> None:
        """Tell what another number of steps does to the learning rate of the next one."""
        config = self.config
        if before == config.steps or done >= config.steps:
            return
        old, new = (
            config.optimizer.lr * lr_factor(config.schedule, min(done, last - 1), last)
            for last in (before, config.steps)
        )
        what = "next" if done < before else "last"
        text = (
            f"{config.steps} steps instead of {before}: the next learning rate is {new:.3g}, where "
            f"the {what} one of the {before} {'was to be' if done < before else 'was'} {old:.3g}"
        )
        self.ctx.logger.note("lengthened", text, config.name, done)
        self.progress.message(f"{config.name}: {text}")


def stage_state(stage: Stage) -> State:
    """All that a stage's checkpoint holds of it.

    Tensors of its own model as they are (``model.*``, ``optim.*``), so that whoever opens the
    checkpoint finds that model; those of other roles behind the role's name.
    """
    state = stage.engine.state_dict()
    tensors, meta = dict(state.tensors), {"engine": state.meta, "state": stage.state_dict()}
    nonfinite = set(state.nonfinite)
    others = {role: engine.state_dict() for role, engine in stage.others().items()}
    for role, other in others.items():
        tensors |= {f"{role}.{name}": tensor for name, tensor in other.tensors.items()}
        nonfinite |= {f"{role}.{name}" for name in other.nonfinite}
    meta["roles"] = {role: other.meta for role, other in others.items()}
    return State(tensors, meta, frozenset(nonfinite))


def copied_files(ctx: StageContext) -> dict[str, bytes]:
    """What a checkpoint has of other folders: the tokenizer, and what an adapter stands on."""
    folder = ctx.directory / TOKENIZER_FOLDER
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}
    if ctx.stage.adapter is not None:
        files[adapted.ADAPTER_FILE] = ctx.adapter_description()
    return files


def described(ctx: StageContext) -> dict[str, bytes]:
    """The recipe, the stage, and a model of another kind than the recipe's."""
    files = {"config.yaml": resolved_yaml(ctx.run).encode()}
    files["stage.json"] = json.dumps({"stage": ctx.stage.name}).encode()
    if ctx.model != ctx.run.model:
        files["model.json"] = ctx.model.model_dump_json().encode()
    return files


def flops_per_token(model: Any, seq_len: int, *, adapts: bool = False) -> float:
    """Training FLOPs a token, by the convention of `metrics.flops`, windows of layers heeded.

    ``adapts``: the model stands still beside an adapter, so its weights have no gradients (4 N in
    place of 6 N). The adapter's own, a few in a hundred, are left out.
    """
    spec = model.spec
    width = spec.layer.num_heads * spec.layer.head_width
    windows = Counter(layer.window for layer in spec.layers)
    number = spec.matmul_parameters()
    products = training_flops_per_token(FlopsShape(number, 0, width, seq_len))
    return (
        products
        - (2.0 * number if adapts else 0.0)
        + sum(
            training_flops_per_token(FlopsShape(0, layers, width, seq_len, sliding_window=window))
            for window, layers in windows.items()
        )
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0

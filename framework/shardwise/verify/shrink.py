"""A user's recipe made small: sizes shrink, structure never does.

For each kind of size (heads, widths, layers, tokens, batch) the smallest is taken with which every
fact of `structure` is the user's. So a small recipe is a function of the recipe, the stage and one
layout. Sizes that also keep the facts of common layouts come first: most layouts of a recipe then
share one small recipe, whose reference is computed once.

Kept as they are: family, tying, biases, norms, rotary scaling, dropout, losses, optimizers, kind of
schedule, updates per rollout, tasks, packing, FP8. What a stage has of its own is for its
config to make small (`StageConfig.shrunk`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from shardwise.config.run import RunConfig
from shardwise.config.schema import BatchConfig, Fp8Config, RoleConfig, SmallSizes, StageConfig
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.ops.fp8 import WIDTHS
from shardwise.optim.schedules import global_batch_at
from shardwise.parallel import feasible
from shardwise.parallel.context import tokens_multiple
from shardwise.parallel.layout import Layout
from shardwise.stages.base import evaluations_of
from shardwise.verify import structure as of
from shardwise.verify.structure import Facts, structure

STEPS = 3
SMALL_NORM = 0.1  # of all gradients: a fresh small model's are beyond it, and are clipped
SMALL_CAPS = (0.02, 0.2)  # of scores and logits: about what fresh small ones are, so they bend
SMALL_ERROR = 1e-6  # of a product: below that of any in 8 bits
SMALL_HISTORY = 2  # updates, so that an amax is forgotten within three
DECODED, WIDEST_DECODED = 32, 256  # multiples that `rollout.native` serves; where that costs much
ATTENDED, WIDEST_ATTENDED = 16, 128  # of `ops.cpu_attention`, in the same way
BYTE_WORDS = 260  # of the byte-level tokenizer
MOST_HEADS, MOST_LAYERS, MOST_ROWS, MOST_RAMPED, MOST_ROWS_AT_ONCE = 64, 16, 512, 64, 8
PIECES = 16  # what the common layouts divide tokens and widths by

_COMMON = (
    Layout(),
    Layout(tp=2),
    Layout(tp=4),
    Layout(cp=2, cp_kind="ulysses"),
    Layout(cp=4, cp_kind="ulysses"),
    Layout(dp=2, shard=2),
    Layout(dp=4, shard=4),
    Layout(pp=2),
    Layout(pp=4),
    Layout(dp=2, shard=2, pp=2),
)
# Rows cost more than another reference.
_COMMON_BATCH = (Layout(), Layout(dp=2, shard=2), Layout(pp=2))
LAYER = re.compile(r"\blayers\.(\d+)(?=\.|$)")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a recipe's stage is made small to, and the user's facts that were ``given_up``."""

    model: DecoderConfig
    stage: SmallSizes
    given_up: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def key(self) -> tuple[str, SmallSizes]:
        """Equal for small recipes of one stage that are equal."""
        return self.model.model_dump_json(), self.stage

    @property
    def model_shape(self) -> str:
        """The model in one line, for people."""
        m = self.model
        shared = f" ({m.kv_heads} KV)" if m.kv_heads != m.num_heads else ""
        return (
            f"{m.num_layers} layers of width {m.hidden_size}, {m.num_heads} heads{shared} of "
            f"{m.head_width}, ffn {m.ffn_width}, vocabulary {m.vocab_size}"
        )

    @property
    def shape(self) -> str:
        """One line, for people."""
        s = self.stage
        window = f", window {w}" if (w := _window_of(self.model)) else ""
        ramp = f" from {s.ramp_start}" if s.ramp_start is not None else ""
        return (
            f"{self.model_shape}; {s.rows} rows{ramp} in micro-batches of {s.micro_batch}, "
            f"{s.seq_len} tokens{window}"
        )


@dataclasses.dataclass(frozen=True)
class Small:
    """A small recipe as plain data, its shape in one line, and what had to be given up."""

    recipe: dict[str, Any]
    shape: str
    given_up: tuple[str, ...]


def shrink(run: RunConfig, stage_name: str, layouts: Sequence[Layout], folder: Path) -> Small:
    """One stage of ``run`` made small; its files lie in ``folder``.

    ``layouts``: of all roles of the stage, under one layout to be verified. Raises ConfigError if
    that cannot be made small (what the user's own sizes allow can).
    """
    [config] = [s for s in run.training if s.name == stage_name]
    small = sizes(run, config, layouts)
    left_out = {"init_from", "init_optimizer", "run_dir", "evaluate_start"}
    left_out |= {"logging", "evaluations", "stages"}
    recipe = run.model_dump(mode="json", exclude=left_out)
    made = config.shrunk(small.stage, folder)
    evaluations = [
        e.shrunk(made, small.stage, folder).model_copy(update={"stages": []})
        for e in evaluations_of(run, config)
    ]
    stage = made.model_dump(mode="json")
    # Every model starts afresh, laid out as verify says.
    stage.pop("start_from")
    if "roles" in stage:
        roles = dict(made.roles)  # type: ignore[attr-defined]
        stage["roles"] = {n: said for n, role in roles.items() if (said := _shrunk_role(role))}
    small_engine = {"layout": "dp1", "precision": "fp64", "compile": False, "device": "cpu"}
    stage["engine"] |= {k: v for k, v in small_engine.items() if k in stage["engine"]}
    limit = config.engine.max_grad_norm  # 0: none
    stage["engine"]["max_grad_norm"] = min(limit, SMALL_NORM)
    if config.engine.fp8 is not None:
        stage["engine"]["fp8"] |= _shrunk_fp8(config.engine.fp8, small.model)
    assert isinstance(run.model, DecoderConfig)
    was, now = run.model.num_layers, small.model.num_layers
    stage = _renumbered(stage, was, now)
    if config.freeze is not None and config.freeze.train_last is not None:
        still = was - config.freeze.train_last
        near = _scaled(still, was, now)
        options = [(small.model, n) for n in sorted(range(now), key=lambda n: abs(n - near))]
        found = _choose(
            options, (run.model, still), lambda case, x: of.still_facts(*case, x), layouts
        )
        stage["freeze"]["train_last"] = now - found[1]
    recipe |= {
        "model": small.model.model_dump(mode="json"),
        "tokenizer": {"kind": "bytes"},
        "stages": [stage],
        "evaluations": [e.model_dump(mode="json") for e in evaluations],
    }
    return Small(recipe, small.shape, small.given_up)


def _scaled(layer: int, was: int, now: int) -> int:
    """A layer's number where there are fewer: as far up, and only the first is the first."""
    return max(layer * now // was, min(layer, now - 1, 1))


def _renumbered(said: Any, was: int, now: int) -> Any:
    """Whatever names a layer by its number (groups, patterns) names one of the small model's."""
    if isinstance(said, dict):
        return {_renumbered(k, was, now): _renumbered(v, was, now) for k, v in said.items()}
    if isinstance(said, list):
        return [_renumbered(value, was, now) for value in said]
    if isinstance(said, str):
        return LAYER.sub(lambda m: f"layers.{_scaled(int(m[1]), was, now)}", said)
    return said


def _shrunk_role(role: RoleConfig | None) -> dict[str, Any]:
    """What a role of a small recipe says."""
    adapter = role.adapter.shrunk() if role and role.adapter else None
    optimizer = role.optimizer.shrunk() if role and role.optimizer else None
    said = {"optimizer": optimizer, "adapter": adapter}
    return {name: part.model_dump(mode="json") for name, part in said.items() if part}


def _shrunk_fp8(config: Fp8Config, model: DecoderConfig) -> dict[str, Any]:
    """Looks at each step: at all layers, or at a few where they may fall back.

    Of those any error is too much, so that they do, and the others go on in 8 bits.
    """
    looks: dict[str, Any] = {"every": 1, "layers": 0}
    if config.sentinel.fallback:
        blocks = model.num_layers - config.first_layers - config.last_layers
        looks |= {"layers": max(1, blocks), "max_error": SMALL_ERROR}
    sentinel = config.sentinel.model_dump(mode="json") | looks
    return {"sentinel": sentinel, "amax_history_len": min(config.amax_history_len, SMALL_HISTORY)}


def sizes(run: RunConfig, stage: StageConfig, layouts: Sequence[Layout]) -> Sizes:
    """The small sizes for one layout (``layouts``: that of each role).

    Raises ConfigError where there are none.
    """
    user = run.model
    assert isinstance(user, DecoderConfig)
    known = {"bytes": BYTE_WORDS, "bpe": run.tokenizer.vocab_size}
    words = user.vocab_size or known.get(run.tokenizer.kind, 0)
    user = user.model_copy(update={"vocab_size": words})
    asked = tuple(dict.fromkeys(layouts))
    tokens = _tokens(stage, asked)
    tp = getattr(getattr(stage, "rollout", None), "tp", 1)  # of who generates
    small = _widths(user, _heads(user, (*asked, Layout(tp=tp))), stage, asked)
    longest = max(tokens, *(e.small_seq_len for e in evaluations_of(run, stage)), 0)
    small = small.model_copy(update={"max_seq_len": longest})
    small = _window(user, _layers(user, small, stage, asked), stage, tokens, asked)
    small = small.with_soft_caps(*SMALL_CAPS)
    rows = _batch(user, stage, tokens, asked)
    batch = _batch_config(rows, stage)
    if why := _refusal(small, batch, asked, stage.engine.fp8):
        raise ConfigError(why)
    given_up: dict[str, None] = {}
    for layout in asked:
        options: dict[str, Any] = {"fp8": stage.engine.fp8}
        if stage.on_policy:
            given_up |= dict.fromkeys(
                of.lost(
                    of.prompt_facts(stage.batch.global_batch, layout),
                    of.prompt_facts(rows.rows * stage.updates_per_batch, layout),
                )
            )
        had = structure(user, stage.batch, layout, updates=stage.updates_per_batch, **options)
        has = structure(small, batch, layout, **options)
        has["updates a global batch"] = stage.updates_per_batch
        given_up |= dict.fromkeys(of.lost(had, has))
    if any(x.world % tp for x in asked):
        given_up[f"rollout.tp: {tp} ranks cannot be had here; each generates alone"] = None
    if not user.vocab_size and any(x.tp > 1 or x.shard > 1 for x in asked):
        given_up["vocabulary: the recipe leaves its size to the tokenizer"] = None
    return Sizes(small, rows, tuple(given_up))


def _refusal(
    model: DecoderConfig,
    batch: BatchConfig,
    layouts: Sequence[Layout],
    fp8: Fp8Config | None = None,
) -> str | None:
    """Why one of the layouts cannot compute this, if so; ``batch``: of an update."""
    counts = {global_batch_at(batch, step) for step in range(batch.ramp_steps + 1)}
    cases = (
        feasible.Case(layout, model, False, rows, batch.micro_batch, "bf16", fp8)
        for layout in layouts
        for rows in sorted(counts)
    )
    return next((why for case in cases if (why := feasible.refusal(case))), None)


def _choose(
    options: Sequence[T], user: T, facts: Callable[[T, Layout], Facts], asked: Sequence[Layout],
    common: Sequence[Layout] = (),
) -> T:  # fmt: skip
    """The first option with the user's facts under all layouts, or at least those asked for.

    Where there is none, the first that gives up the fewest of them.
    """
    wanted = {x: facts(user, x) for x in (*asked, *common)}
    for layouts in ((*asked, *common), asked):
        for option in options:
            if all(facts(option, x) == wanted[x] for x in layouts):
                return option
    return min(options, key=lambda o: sum(len(of.lost(wanted[x], facts(o, x))) for x in asked))


# --- the model ----------------------------------------------------------------------------------


def _heads(user: DecoderConfig, asked: Sequence[Layout]) -> DecoderConfig:
    """The fewest heads that divide, are shared and are replicated as the user's are."""
    q, kv = user.num_heads, user.kv_heads
    pairs = {
        (g * r, g)
        for g, r in itertools.product(range(1, min(kv, MOST_HEADS) + 1), range(1, q // kv + 1))
        if g * r <= MOST_HEADS
    }
    shares = "num_kv_heads" in type(user).model_fields
    options = [
        user.model_copy(update={"num_heads": h, **({"num_kv_heads": g} if shares else {})})
        for h, g in sorted(pairs)
    ]
    common = [x for x in _COMMON if not _refusal_of_heads(user, x)]

    def facts(model: DecoderConfig, layout: Layout) -> Facts:
        can = model is user or any(
            _divides(model.num_heads * head_dim, user.hidden_size, layout.shard)
            for head_dim in _head_widths(model.num_heads, user)
        )
        return of.head_facts(model, layout) | {"width can be left over": can}

    return _choose(options, user, facts, asked, common)


def _head_widths(heads: int, user: DecoderConfig) -> range:
    """Head widths to try: the more heads, the narrower."""
    if user.head_width % ATTENDED == 0 and heads * ATTENDED <= WIDEST_ATTENDED:
        return range(ATTENDED, 4 * ATTENDED, ATTENDED)
    least = 8 if heads <= 8 else 4
    return range(least, least + 8, 2)


def _divides(small: int, user: int, ranks: int) -> bool:
    """Whether both numbers are multiples of ``ranks``, or neither."""
    return (small % ranks == 0) == (user % ranks == 0)


def _refusal_of_heads(model: DecoderConfig, layout: Layout) -> bool:
    return any(" over " in str(fact) for fact in of.head_facts(model, layout).values())


def _widths(
    user: DecoderConfig, small: DecoderConfig, stage: StageConfig, asked: Sequence[Layout]
) -> DecoderConfig:
    """Head width, model width, feed-forward and vocabulary that leave over what the user's do."""
    fp8 = stage.engine.fp8
    multiple = 1 if fp8 is None else WIDTHS[fp8.recipe]  # every rank's part in whole tiles
    tp = math.lcm(*(x.tp for x in asked))
    heads, own = small.num_heads, "head_dim" in type(user).model_fields
    head_widths = _head_widths(heads, user)
    if fp8 is not None:
        local = math.gcd(*(max(1, small.kv_heads // x.tp) for x in asked))
        least = max(head_widths[0], multiple // math.gcd(multiple, local))
        head_widths = range(least, least + 1)
    least = head_widths[0]
    options: list[DecoderConfig] = []
    for head_dim in head_widths:
        width = heads * head_dim
        if user.head_width * user.num_heads == user.hidden_size:
            options.append(small.with_widths(width, head_dim))
            continue
        width += math.lcm(head_dim, multiple)
        more = range(0, max(1, tp if fp8 is None else 1))  # of which tp ranks leave something over
        options += [small.with_widths(width + n, head_dim) for n in more]
    if stage.on_policy and user.hidden_size % DECODED == user.head_width % DECODED == 0:
        # What serves the user's rollouts serves the small model's. A head as wide as that is dear:
        # where a family allows it, the model is narrower than its heads.
        width = heads * max(DECODED, least)
        if own:
            width = min(width, 2 * max(DECODED, multiple))
        if width <= WIDEST_DECODED:
            options = [small.with_widths(width, max(DECODED, least))]
    cut = [x for x in asked if x.shard > 1 or x.tp > 1]

    def divides(model: DecoderConfig, layout: Layout) -> Facts:
        left_over = model.hidden_size % layout.tp if fp8 is None else 0
        return {"": (_divides(model.hidden_size, 0, layout.shard), left_over)}

    found = _choose(options, user, divides, cut or asked, [x for x in _COMMON if x.shard > 1])
    pieces = math.lcm(PIECES, tp * multiple, *(x.shard for x in asked))
    words = user.vocab_size or BYTE_WORDS
    updates = {"vocab_size": BYTE_WORDS + (words - BYTE_WORDS) % pieces}
    if getattr(user, "ffn_size", None) is not None:
        # With layers as dear as the head, or pipeline stages of equal depth would be rare.
        narrow = max(found.hidden_size * 3 // 2, 96)
        left_over = user.ffn_width if fp8 is None else 0
        updates["ffn_size"] = narrow + (left_over - narrow) % pieces
    return found.model_copy(update=updates)


def _layers(
    user: DecoderConfig, small: DecoderConfig, stage: StageConfig, asked: Sequence[Layout]
) -> DecoderConfig:
    """The fewest layers that lie on pipeline stages as the user's do."""
    fp8 = stage.engine.fp8
    most = max(MOST_LAYERS, *(3 * x.num_chunks for x in asked))
    if fp8 is not None:
        most += fp8.first_layers + fp8.last_layers
    options = []
    # One more than the user's, where a dear head makes stages of those unequal.
    for layers in range(1, min(user.num_layers + 1, most) + 1):
        options.append(small.with_layers(layers))
    common = [x for x in _COMMON if 1 < x.pp <= user.num_layers and (x.pp == 2 or _deep(user))]
    return _choose(options, user, lambda m, x: of.layer_facts(m, x, fp8), asked, common)


def _deep(model: DecoderConfig) -> bool:
    return model.num_layers > 10


def _window_of(model: DecoderConfig) -> int | None:
    """Of its layers that have one."""
    return next((x.window for x in model.spec.layers if x.window is not None), None)


def _window(
    user: DecoderConfig,
    small: DecoderConfig,
    stage: StageConfig,
    tokens: int,
    asked: Sequence[Layout],
) -> DecoderConfig:
    """A window that reaches as far as the user's: into ranks' tokens, or over the whole row."""
    window = _window_of(user)
    if window is None:
        return small
    length = stage.batch.seq_len
    near = window * tokens // length
    wishes = sorted(range(2, tokens + 1), key=lambda w: (w != tokens // 3, abs(w - near)))
    options = [(small.with_window(w), tokens) for w in wishes]

    def facts(case: tuple[DecoderConfig, int], layout: Layout) -> Facts:
        return {"window": of.token_facts(*case, layout).get("window")}

    common = [Layout(cp=2), Layout(cp=4)]
    return _choose(options, (user, length), facts, asked, common)[0]


# --- the batch ----------------------------------------------------------------------------------


def _tokens(stage: StageConfig, asked: Sequence[Layout]) -> int:
    """Tokens of a row, of which as many are left over as of the user's."""
    least = stage.small_seq_len
    pieces = math.lcm(*map(tokens_multiple, asked))
    pieces = PIECES if PIECES % pieces == 0 else pieces
    return least + (stage.batch.seq_len - least) % pieces


def _batch(
    user: DecoderConfig, stage: StageConfig, tokens: int, asked: Sequence[Layout]
) -> SmallSizes:
    """The fewest rows, dealt and cut as the user's are, that a pipeline's schedule can take."""
    own, rows = stage.batch, stage.batch.global_batch // stage.updates_per_batch
    whole = SmallSizes(STEPS, rows, own.micro_batch, tokens, own.ramp_start)
    ramped = own.ramp_start is not None
    fp8 = stage.engine.fp8 is not None
    most = max(rows, *(x.dp for x in asked)) if fp8 else rows
    several = range(1 if fp8 else 2, min(own.micro_batch, MOST_ROWS_AT_ONCE) + 1)
    options = [
        SmallSizes(STEPS, total, at_once, tokens, start)
        for total in range(1, min(most, MOST_RAMPED if ramped else MOST_ROWS) + 1)
        for at_once in ([1] if own.micro_batch == 1 else several)
        for start in (range(1, total + 1) if ramped else (None,))
    ]
    if fp8:  # one process scales the same micro-batches
        options = [x for x in options if not any(x.rows % (y.dp * x.micro_batch) for y in asked)]
    else:
        options.append(whole)

    def facts(small: SmallSizes, layout: Layout) -> Facts:
        batch = _batch_config(small, stage)
        if small is wanted:  # a ramp's own steps meet other rows than a few do
            batch = batch.model_copy(update={"ramp_steps": own.ramp_steps})
        refused = _refusal(user, batch, [layout]) is not None
        found = of.batch_facts(batch, layout) | {"refused": refused}
        if stage.on_policy and layout in asked:
            found |= of.prompt_facts(small.rows * stage.updates_per_batch, layout)
        if layout not in asked:  # many rows, for a layout that nobody asked for
            found.pop(of.TIMES, None)
        return found

    wanted = dataclasses.replace(whole)
    found = _choose(options, wanted, facts, asked, _COMMON_BATCH)
    if not ramped or not any(facts(found, layout)["refused"] for layout in asked):
        return found
    # A short ramp has other steps than the user's long one, and a schedule may take none of them.
    level = [dataclasses.replace(x, ramp_start=None) for x in options]
    return _choose(level, dataclasses.replace(whole, ramp_start=None), facts, asked, _COMMON_BATCH)


def _batch_config(small: SmallSizes, stage: StageConfig) -> BatchConfig:
    """The batch of an update."""
    return BatchConfig(
        global_batch=small.rows,
        micro_batch=small.micro_batch,
        seq_len=small.seq_len,
        ramp_start=small.ramp_start,
        ramp_steps=0 if small.ramp_start is None else min(stage.batch.ramp_steps, small.steps - 1),
    )

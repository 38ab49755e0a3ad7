"""What verify makes of a recipe: small, and still the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardwise.config.load import load_config
from shardwise.config.registry import STAGE_CONFIGS
from shardwise.config.run import RunConfig
from shardwise.config.schema import BatchConfig, SmallSizes, StageConfig
from shardwise.data.config import DataConfig
from shardwise.data.datasets import build_pretrain_dataset, build_validation
from shardwise.data.fast_tokenizer import ByteTokenizer
from shardwise.data.packing import SlidingRows
from shardwise.data.stand_ins import is_small, small_sources
from shardwise.errors import ConfigError, UserError
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.layout import Layout, parse_layout, world_of
from shardwise.stages.evaluation_configs import BitsConfig
from shardwise.stages.run import check_stage
from shardwise.verify import suite
from shardwise.verify.roles import layouts_of, own_layouts, with_layouts
from shardwise.verify.shrink import STEPS, Sizes, shrink, sizes
from shardwise.verify.structure import lost, still_facts, structure
from tests.parallel.test_feasible import layouts

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def small(run: RunConfig, stage: str, folder: Path, layout: str = "dp2.zero2") -> Any:
    again = load_config(run.model_dump(mode="json")).config  # as verify hands it to its ranks
    recipe = shrink(again, stage, layouts_of(layout), folder).recipe
    return load_config(recipe).config.stages[0]


def ppo(**stage: Any) -> RunConfig:
    recipe = suite.recipe("llama")
    recipe["stages"] = [{**suite.STAGES["ppo"], **stage}]
    return load_config(recipe).config


def pretrain(
    model: dict[str, Any] | None = None, batch: dict[str, int] | None = None, **stage: Any
) -> RunConfig:
    recipe = suite.recipe("llama")
    recipe["model"] |= model or {}
    whole = {"global_batch": 32, "micro_batch": 2, "seq_len": 128, **(batch or {})}
    recipe["stages"] = [{"kind": "pretrain", "steps": 30, "batch": whole, **stage}]
    return load_config(recipe).config


def sized(run: RunConfig, layout: str) -> Sizes:
    return sizes(run, run.stages[0], layouts_of(layout))


def facts(run: RunConfig, found: Sizes, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """The user's and the small recipe's."""
    assert isinstance(run.model, DecoderConfig)
    user = run.stages[0]
    small = found.stage
    ramp = min(user.batch.ramp_steps, small.steps - 1)
    batch = BatchConfig(
        global_batch=small.rows,
        micro_batch=small.micro_batch,
        seq_len=small.seq_len,
        ramp_start=small.ramp_start,
        ramp_steps=ramp,
    )
    had = structure(run.model, user.batch, layout, fp8=user.engine.fp8)
    return had, structure(found.model, batch, layout, fp8=user.engine.fp8)


# --- structure ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(layouts(), st.data())
def test_a_small_recipe_has_the_users_structure(layout: Layout, data: st.DataObject) -> None:
    """Every layout that is feasible for the user's sizes can be made small, and loses no fact."""
    kv, group = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 6))
    num = data.draw(st.integers(1, 40))
    model = {
        "num_kv_heads": kv,
        "num_heads": kv * group,
        "hidden_size": kv * group * data.draw(st.sampled_from([16, 64, 66])),
        "num_layers": num,
        "ffn_size": data.draw(st.integers(100, 5000)),
        "vocab_size": data.draw(st.integers(300, 40000)),
    }
    if data.draw(st.booleans()):
        model |= {"sliding_window": data.draw(st.integers(2, 400)), "window_start_layer": num // 2}
    batch = {
        "global_batch": data.draw(st.integers(1, 96)),
        "micro_batch": data.draw(st.integers(1, 9)),
        "seq_len": data.draw(st.integers(8, 400)),
    }
    run = pretrain(model, batch)
    try:
        check_stage(run, with_layouts(run.stages[0], str(layout), compile=False), layout.world)
    except ConfigError:
        assume(False)
    found = sizes(run, run.stages[0], [layout])
    had, has = facts(run, found, layout)
    assert lost(had, has) == list(found.given_up) == []
    assert found.model.hidden_size <= 400 and found.model.num_layers <= max(16, num + 1)
    assert found.stage.rows <= batch["global_batch"] and found.stage.seq_len <= 128


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(2, 40), st.integers(1, 40), st.integers(1, 40))
def test_ramps_keep_their_structure(layout: Layout, full: int, start: int, steps: int) -> None:
    assume(start <= full)
    ramp = {"global_batch": full, "ramp_start": start, "ramp_steps": min(steps, 30)}
    run = pretrain({"num_kv_heads": 12, "num_heads": 48, "hidden_size": 96, "num_layers": 24}, ramp)
    try:
        check_stage(run, with_layouts(run.stages[0], str(layout), compile=False), layout.world)
    except ConfigError:
        assume(False)
    found = sizes(run, run.stages[0], [layout])
    had, has = facts(run, found, layout)
    assert lost(had, has) == list(found.given_up)
    assert has["batch ramp"] == (found.stage.ramp_start is not None)
    if not has["batch ramp"]:  # no short ramp has steps that the schedule takes
        assert "batch ramp: no, in the recipe yes" in found.given_up


def test_a_ramp_that_ranks_share_unevenly_on_its_way_stays_one() -> None:
    """From 8 to 32 rows in ten steps: 8, 10, 12, 15, and so on."""
    model = {"num_heads": 8, "num_kv_heads": 2, "hidden_size": 64, "num_layers": 8}
    ramp = {"global_batch": 32, "micro_batch": 2, "ramp_start": 8, "ramp_steps": 10}
    small = sized(pretrain(model, ramp), "dp2.zero2").stage
    assert small.ramp_start is not None and small.ramp_start < small.rows
    sizes_met = {small.ramp_start, (small.ramp_start + small.rows) // 2}
    assert any(rows % 2 for rows in sizes_met) and small.rows % 2 == 0


def test_what_names_layers_by_number_names_those_of_the_small_model(tmp_path: Path) -> None:
    """Of 8 layers, where the small model has 4."""
    adapter = {"kind": "lora", "rank": 8, "rank_pattern": {"layers.6.*": 2, "layers.0.*": 1}}
    made: Any = small(pretrain(adapter=adapter), "pretrain", tmp_path).adapter
    assert made.rank_pattern == {"layers.3.*": 2, "layers.0.*": 1}
    still = {"train_last": 6, "patterns": ["layers.7.attn.*"]}
    made = small(pretrain(freeze=still), "pretrain", tmp_path).freeze
    assert made.train_last == 3 and made.patterns == ["layers.3.attn.*"]


def test_pipeline_stages_train_as_many_of_their_layers_as_the_users_do(tmp_path: Path) -> None:
    """A dear head: most layers lie on the first stage, whose last ones are trained."""
    dear = {"num_layers": 10, "vocab_size": 32001, "tie_embeddings": False}
    run, layout = pretrain(dear, freeze={"train_last": 4}), Layout(pp=2)
    model = sized(run, "pp2").model
    made: Any = small(run, "pretrain", tmp_path, "pp2").freeze
    assert isinstance(run.model, DecoderConfig)
    has = still_facts(model, model.num_layers - made.train_last, layout)
    assert has == still_facts(run.model, 6, layout)


def test_a_bottleneck_leaves_over_what_the_users_does(tmp_path: Path) -> None:
    for size, found in ((64, 8), (33, 9), (5, 5)):
        adapter = {"kind": "bottleneck", "placement": "parallel", "size": size}
        assert small(pretrain(adapter=adapter), "pretrain", tmp_path).adapter.size == found


def test_windows_that_alternate_meet_pipeline_stages_as_the_users_do() -> None:
    """Six layers of two kinds on two stages: the second begins with the other kind."""
    gemma = {"family": "gemma2", "num_layers": 6, "sliding_window": 64, "head_dim": 16}
    run = pretrain(gemma | {"tie_embeddings": True})
    fact = "every pipeline stage has kinds of layers as the first has"
    had, has = facts(run, sized(run, "pp2"), Layout(pp=2))
    assert had[fact] is has[fact] is False


def test_a_width_that_tensor_ranks_cannot_share_stays_one() -> None:
    run = pretrain({"num_heads": 8, "num_kv_heads": 4, "hidden_size": 250, "head_dim": 32})
    found = sized(run, "tp4")
    assert found.model.hidden_size % 4 == 2 and not found.given_up


def test_a_window_reaches_into_a_rings_pieces_as_the_users_does() -> None:
    for window, words in ((40, "within a piece"), (100, "within a rank"), (192, "beyond a rank")):
        run = pretrain({"sliding_window": window}, {"seq_len": 256})
        had, has = facts(run, sized(run, "cp2.ring"), Layout(cp=2))
        assert had["window"] == has["window"] and had["window"].startswith(words)


def test_ranks_have_several_prompts_where_the_users_have() -> None:
    recipe = suite.recipe("llama")
    [stage] = [s for s in recipe["stages"] if s["kind"] == "grpo"]
    stage["batch"] = {**stage["batch"], "global_batch": 32, "micro_batch": 32}
    recipe["stages"] = [stage]
    run = load_config(recipe).config
    assert sized(run, "tp4").stage.rows * run.stages[0].updates_per_batch >= 8
    stage["batch"]["global_batch"] = 6
    assert sized(load_config(recipe).config, "tp4").stage.rows % 4 != 0


def test_several_kv_heads_a_rank_stay_several() -> None:
    run = pretrain({"num_heads": 32, "num_kv_heads": 8, "hidden_size": 256})
    for layout, kv in (("tp2", 3), ("tp4", 2), ("tp8", 1)):
        found = sized(run, layout).model
        assert found.kv_heads // parse_layout(layout, world_of(layout)).tp >= kv
        assert found.num_heads // found.kv_heads >= 3
    assert sized(pretrain({"num_heads": 8, "num_kv_heads": 2}), "tp4").model.kv_heads == 2


def test_layers_stay_uneven_several_and_of_two_digits() -> None:
    assert sized(pretrain({"num_layers": 5}), "pp2").model.num_layers == 5
    assert sized(pretrain({"num_layers": 8}), "pp2").model.num_layers == 4
    assert sized(pretrain({"num_layers": 4}), "pp4").model.num_layers == 4
    for layout in ("pp2", "tp2", "dp2.zero3"):
        assert 11 <= sized(pretrain({"num_layers": 48}), layout).model.num_layers <= 12
    odd = sized(pretrain({"num_layers": 49}), "pp4").model
    assert odd.num_layers > 10 and odd.num_layers % 4


def test_lengths_stay_ragged() -> None:
    for seq_len in (128, 129, 131, 133):
        for layout, pieces in (("cp2.ring", 4), ("tp2.sp", 2), ("cp3.ring", 6)):
            found = sized(pretrain(None, {"seq_len": seq_len}), layout).stage.seq_len
            assert found % pieces == seq_len % pieces and found < 64


def test_rows_stay_ragged_and_ranks_without_any() -> None:
    run = pretrain(None, {"global_batch": 33, "micro_batch": 2})
    assert sized(run, "dp2.zero1").stage.rows % 2 == 1
    empty = pretrain(None, {"global_batch": 9, "micro_batch": 2})
    found = sized(empty, "dp4.zero2").stage
    share = -(-found.rows // 4)
    assert -(-found.rows // share) == 3  # of 4 ranks, one has none


def test_a_micro_batch_of_one_stays_one() -> None:
    run = pretrain(None, {"micro_batch": 1})
    assert sized(run, "dp2.zero1").stage.micro_batch == 1
    assert sized(pretrain(), "dp2.zero1").stage.micro_batch == 2


def test_most_layouts_share_one_small_recipe() -> None:
    """So that one reference does for them."""
    run = pretrain({"num_heads": 32, "num_kv_heads": 8, "hidden_size": 256, "num_layers": 32})
    keys = [sized(run, x).key for x in suite.LAYOUTS]
    assert len(set(keys)) <= 7
    assert max(map(keys.count, keys)) >= 30


def test_the_shape_is_told() -> None:
    run = pretrain({"sliding_window": 64, "vocab_size": 32001})
    assert sized(run, "tp2").shape == (
        "5 layers of width 64, 8 heads (2 KV) of 8, ffn 96, vocabulary 273; "
        "8 rows in micro-batches of 2, 32 tokens, window 10"
    )


def test_what_is_given_up_is_told() -> None:
    """A decoder's heads of 32 would be dear in a model as wide as its heads."""
    recipe = suite.recipe("llama")
    recipe["model"] |= {"hidden_size": 1024, "num_heads": 32, "num_kv_heads": 8}
    run = load_config(recipe).config
    by_kind = {s.kind: sizes(run, s, layouts_of("tp2")) for s in run.stages}
    assert by_kind["pretrain"].given_up == ()
    assert by_kind["grpo"].given_up == ("heads make up the width: no, in the recipe yes",)
    assert by_kind["grpo"].model.head_width == 32


def test_a_layout_that_cannot_be_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"tp3 does not divide num_heads"):
        sized(pretrain(), "tp3")


# --- recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_stage_of_our_recipes_can_be_made_small(path: Path, tmp_path: Path) -> None:
    run = load_config(path).config
    for stage in run.training:
        assert small(run, stage.name, tmp_path).kind == stage.kind


def test_nobody_is_told_of_it(tmp_path: Path) -> None:
    recipe = suite.recipe("llama") | {"logging": {"wandb": "online", "tensorboard": True}}
    found = shrink(load_config(recipe).config, "pretrain", [Layout()], tmp_path).recipe
    assert load_config(found).config.logging.wandb == "off"


@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "cosine", "warmup_steps": 9, "min_ratio": 0.1},
        {"kind": "linear"},
        {"kind": "wsd", "warmup_steps": 3, "decay_steps": 8},
        {"kind": "cosine_restarts", "cycle_steps": 9, "cycle_factor": 2.0},
    ],
)
def test_a_schedule_keeps_its_kind_and_phases(schedule: dict[str, Any], tmp_path: Path) -> None:
    stage = small(pretrain(schedule=schedule), "pretrain", tmp_path)
    assert stage.steps == STEPS and stage.schedule.kind == schedule["kind"]
    for phase in ("warmup_steps", "decay_steps", "cycle_steps"):
        assert getattr(stage.schedule, phase) == min(schedule.get(phase, 0), 1)


def test_updates_per_rollout_and_rows_of_each_stay(tmp_path: Path) -> None:
    stage = small(ppo(updates_per_rollout=4), "ppo", tmp_path)
    assert stage.updates_per_rollout == 4
    assert stage.batch.global_batch == 4 * 8


def test_nulls_of_the_user_stay_null(tmp_path: Path) -> None:
    loss = {"preset": "verl_default", "value_clip": None, "dual_clip": None}
    found = small(ppo(loss=loss), "ppo", tmp_path).loss
    assert found.value_clip is None and found.dual_clip is None


def test_the_actor_is_trained_whatever_its_warm_up(tmp_path: Path) -> None:
    assert small(ppo(steps=20, critic_warmup_steps=10), "ppo", tmp_path).critic_warmup_steps == 1
    assert small(ppo(critic_warmup_steps=0), "ppo", tmp_path).critic_warmup_steps == 0


def test_a_stage_that_declares_nothing_is_made_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another package may."""

    class Plain(StageConfig):
        kind: Literal["plain_stage"]
        texts: DataConfig = DataConfig()

    monkeypatch.setitem(STAGE_CONFIGS, "plain_stage", Plain)
    recipe = suite.recipe("llama")
    recipe["stages"] = [{"kind": "plain_stage", "steps": 100, "batch": {"global_batch": 512}}]
    stage = small(load_config(recipe).config, "plain_stage", tmp_path)
    assert stage.steps == STEPS and stage.batch.global_batch <= 64
    assert stage.texts.sources[0].path.parent == tmp_path


def test_a_roles_optimizer_and_adapter_are_kept_under_any_layout(tmp_path: Path) -> None:
    own = {"optimizer": {"kind": "sgd", "lr": 0.1}, "adapter": {"kind": "lora"}}
    run = ppo(roles={"critic": {**own, "ranks": [0]}})
    for text in ("tp2", "actor=tp2@0-1,critic=dp2.zero2@2-3"):
        stage = small(run, "ppo", tmp_path, text)
        critic = with_layouts(stage, text).roles.critic  # type: ignore[attr-defined]
        assert critic.optimizer.kind == "sgd"
        assert critic.adapter.kind == "lora"
        assert critic.ranks == ([2, 3] if "=" in text else None)


# --- data ---------------------------------------------------------------------------------------


def write(path: Path, rows: int, text: str) -> dict[str, Any]:
    path.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(rows)))
    return {"kind": "jsonl", "path": str(path)}


def test_a_users_small_files_are_used_and_large_ones_stood_in_for(tmp_path: Path) -> None:
    little, much = write(tmp_path / "a", 9, "b"), write(tmp_path / "c", 2000, "d" * 1000)
    data = {"sources": [little | {"weight": 3.0}, much], "held_out": 0.1}
    found = small(pretrain(data=data), "pretrain", tmp_path).data
    assert found.sources[0].path == tmp_path / "a" and found.sources[0].weight == 3.0
    assert found.sources[1].path != tmp_path / "c" and found.sources[1].weight == 1.0
    assert found.validation and found.held_out == 0.0
    whole = small(pretrain(data={"sources": [little], "held_out": 0.1}), "pretrain", tmp_path).data
    assert whole.held_out == 0.1 and whole.sources[0].path == tmp_path / "a"


def test_validation_is_kept_on_other_documents(tmp_path: Path) -> None:
    stage = small(pretrain(validation={"every": 10}), "pretrain", tmp_path)
    assert stage.validation.every == 2 and stage.validation.max_batches == 8
    data = build_pretrain_dataset(stage.data, ByteTokenizer(), 32, 0, tmp_path / "cache")
    assert data.validation is not None
    assert data.validation.num_rows >= 1 and 2 * stage.batch.global_batch < data.num_rows
    train = {d.text for d in stage.data.sources[0].documents()}
    # The shortest texts are few, so that some occur in both.
    assert len({d.text for d in data.validation.documents()} - train) >= 12


@pytest.mark.parametrize("stride", [0, 64])
def test_the_last_row_of_an_evaluation_is_alone_on_its_rank(stride: int, tmp_path: Path) -> None:
    stage = small(pretrain(), "pretrain", tmp_path)
    sizes = SmallSizes(STEPS, 4, 2, 128)
    asked = BitsConfig(kind="bits_per_byte", name="bits", seq_len=128, stride=stride)
    found = asked.shrunk(stage, sizes, tmp_path)
    validation = build_validation(found.data, ByteTokenizer(), found.seq_len, tmp_path / "cache")
    assert validation is not None
    rows = SlidingRows(validation.rows, found.stride or found.seq_len).num_rows
    assert rows > 8 and rows % (2 * found.micro_batch) == 1


def test_lines_that_are_too_long_are_stood_in_for(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    line = {"prompt": "p", "chosen": "c" * 300, "rejected": "r"}
    path.write_text(json.dumps(line) + "\n")
    recipe = suite.recipe("llama")
    source = {"kind": "preference-jsonl", "path": str(path)}
    stage = {"kind": "reward", "steps": 3, "data": {"sources": [source]}}
    recipe["stages"] = [{**stage, "batch": {"seq_len": 512}}]
    run = load_config(recipe).config
    [found] = small(run, "reward", tmp_path).data.sources
    assert found.path != path and is_small(found, 160)
    assert small_sources([found], tmp_path, "train") == [found]


# --- layouts ------------------------------------------------------------------------------------


def test_the_recipes_own_layouts() -> None:
    def own(engine: str = "dp2.zero2", **roles: Any) -> str:
        return own_layouts(ppo(engine={"layout": engine}, roles=roles).stages[0])

    assert own() == "dp2.zero2"
    assert own(critic={"optimizer": {"lr": 1e-3}}) == "dp2.zero2"
    placed = own(actor={"ranks": [0, 1], "engine": {"layout": "tp2"}}, critic={"ranks": [2, 3]})
    assert placed == "actor=tp2@0-1,reference=dp2.zero2,reward=dp2.zero2,critic=dp2.zero2@2-3"
    with pytest.raises(UserError, match="layout auto"):
        own("auto")
    with pytest.raises(UserError, match="gaps"):
        own(critic={"ranks": [0, 2]})


@pytest.mark.parametrize(("layout", "fits"), [("dp2.zero2", True), ("dp3.zero1", False)])
def test_a_shared_generator_stays_where_the_ranks_can_share_one(
    tmp_path: Path, layout: str, fits: bool
) -> None:
    said = {"tp": 2, "max_slots": 5, "max_cache_tokens": 64}
    found = shrink(ppo(rollout=said), "ppo", layouts_of(layout), tmp_path)
    assert found.recipe["stages"][0]["rollout"] == said | {"max_cache_tokens": None}
    assert any("rollout.tp" in line for line in found.given_up) != fits
    [stage] = load_config(found.recipe).config.training
    assert with_layouts(stage, layout).rollout.tp == (2 if fits else 1)  # type: ignore[attr-defined]
    assert with_layouts(stage, "dp1").rollout.tp == 1  # type: ignore[attr-defined]

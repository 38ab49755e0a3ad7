"""What `init` writes, and what it refuses: a message with the mend, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import shardwise
from shardwise.config.load import load_config
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import DataError, UserError
from shardwise.recipes.api import Written, init
from shardwise.recipes.model import open_start
from tests.recipes.tiny import data_file, model_folder
from tests.support.hub import HubCache

SEVEN_B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder("llama2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model of 6.7 billion parameters but for its weights."""
    folder = tmp_path / "seven"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SEVEN_B))
    ByteTokenizer().save(folder)
    return folder


def why(written: Written) -> dict[str, str]:
    return {choice.name: choice.why for choice in written.choices}


def test_a_recipe_says_what_was_chosen_and_why(model: Path, tmp_path: Path) -> None:
    data = data_file("sft", "alpaca", tmp_path, rows=200)
    out = tmp_path / "mine.yaml"
    written = shardwise.init(model, data, stage="sft", adapter="lora", out=out)
    run = load_config(out).config
    [stage] = run.stages
    assert (run.name, str(run.init_from), stage.kind) == ("mine", str(model), "sft")
    assert stage.adapter is not None and stage.adapter.kind == "lora"
    assert stage.data.sources[0].kind == "alpaca"  # type: ignore[attr-defined]
    assert stage.data.held_out == 0.05  # type: ignore[attr-defined]
    said = why(written)
    assert "95 % of the 200 rows have at most" in said["stages.0.batch.seq_len"]
    assert "ten times that for LoRA" in said["stages.0.optimizer.lr"]
    assert "200 rows, told by instruction, output" in said["stages.0.data.sources"]
    text, lines = out.read_text(), written.lines()
    for choice in written.choices:
        if choice.why:
            assert choice.why.split()[0] in text and any(choice.why in line for line in lines)
    assert lines[-1] == f"written: {out}; start it: shardwise train {out}"


def test_data_apart_are_measured_on(model: Path, tmp_path: Path) -> None:
    data, apart = (data_file("sft", form, tmp_path) for form in ("messages", "sharegpt"))
    init(model, data, stage="sft", held_out=apart, out=tmp_path / "a.yaml")
    found = load_config(tmp_path / "a.yaml").config.stages[0].data  # type: ignore[attr-defined]
    assert (found.held_out, found.validation[0].kind) == (0.0, "sharegpt")


def test_few_rows_are_all_learned_from(model: Path, tmp_path: Path) -> None:
    data = data_file("sft", "messages", tmp_path, rows=5)
    init(model, data, stage="sft", out=tmp_path / "a.yaml")
    stage = load_config(tmp_path / "a.yaml").config.stages[0]
    assert stage.data.held_out == 0.0 and stage.validation.every == 0  # type: ignore[attr-defined]


def test_long_rows_are_dropped_where_nearly_all_are_short(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "why?", "completion": "x" * (400 if i == 7 else 20)} for i in range(150)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    written = init(model, data, stage="sft", out=tmp_path / "a.yaml")
    stage = load_config(tmp_path / "a.yaml").config.stages[0]
    assert stage.batch.seq_len == 64 and stage.data.too_long == "drop"  # type: ignore[attr-defined]
    assert "(1 row dropped)" in why(written)["stages.0.batch.seq_len"]
    short = data_file("sft", "messages", tmp_path)
    init(model, short, stage="sft", held_out=data, out=tmp_path / "c.yaml")
    stage = load_config(tmp_path / "c.yaml").config.stages[0]
    assert stage.data.too_long == "drop", "for the data apart"  # type: ignore[attr-defined]
    whole = init(model, data, stage="sft", seq_len=500, out=tmp_path / "b.yaml")
    assert "dropped" not in why(whole)["stages.0.batch.seq_len"]


def test_ranks_elsewhere_need_nothing_of_this_machine(large: Path, tmp_path: Path) -> None:
    data, out = data_file("sft", "messages", tmp_path), tmp_path / "a.yaml"
    written = init(large, data, stage="sft", ranks=8, gpu_memory=24, out=out)
    engine = load_config(out).config.stages[0].engine
    assert engine.layout in ("zero2", "zero3")
    assert written.train == f"shardwise train {out} --nproc 8"
    assert 8 < written.gib_a_rank < 21


def test_a_verifier_is_chosen_by_name(model: Path, tmp_path: Path) -> None:
    data, out = data_file("grpo", "problems", tmp_path), tmp_path / "a.yaml"
    written = init(model, data, stage="grpo", reward="numeric", out=out)
    run = load_config(out).config
    [stage] = run.stages
    assert [part.kind for part in stage.reward.parts] == ["numeric"]  # type: ignore[attr-defined]
    assert [p.kind for p in run.evaluations[0].reward.parts] == ["numeric"]  # type: ignore[attr-defined]
    assert "is the reference's number" in why(written)["stages.0.reward.parts"]
    own = tmp_path / "mine.py"
    own.write_text("def score(question, completion, answer, meta):\n    return 1.0\n")
    init(model, data, stage="grpo", reward=f"{own}:score", out=out, force=True)
    [part] = load_config(out).config.stages[0].reward.parts  # type: ignore[attr-defined]
    assert (part.kind, part.function) == ("user", f"{own}:score")


@pytest.mark.parametrize(
    ("stage", "reward", "said"),
    [
        ("grpo", "numbers", "--reward numbers: known: exact, numeric, answer, .*or path.py:name"),
        ("grpo", "length", "--reward length: known"),  # it asks for keys of its own
        ("grpo", "mine:score", "--reward mine:score: .*path"),
        ("grpo", "numeric", "--reward numeric: the answer 'blue' is no number"),
        ("sft", "answer", "--reward answer: of --stage grpo alone"),
    ],
)
def test_verifiers_that_cannot_be(
    model: Path, tmp_path: Path, stage: str, reward: str, said: str
) -> None:
    data = tmp_path / "data.jsonl"
    row = {"prompt": "Which colour?", "answer": "blue"}
    data.write_text("".join(json.dumps(row | {"n": i}) + "\n" for i in range(9)))
    with pytest.raises(UserError, match=said):
        init(model, data, stage=stage, reward=reward, out=tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()


@pytest.mark.parametrize(("stage", "form"), [("sft", "messages"), ("dpo", "preference")])
def test_a_duration_is_told_with_what_it_assumes(
    model: Path, tmp_path: Path, stage: str, form: str
) -> None:
    data, out = data_file(stage, form, tmp_path), tmp_path / "a.yaml"
    written = init(model, data, stage=stage, out=out)
    assert written.seconds is not None and written.seconds > 0
    assert "here, if rows are computed at 45%" in written.takes and written.takes in written.lines()
    assert "# Duration: about" in out.read_text()
    twice = init(model, data, stage=stage, epochs=200, out=out, force=True)
    assert twice.seconds is not None and twice.seconds > written.seconds
    elsewhere = init(model, data, stage=stage, gpu_memory=24, out=out, force=True)
    assert elsewhere.seconds is None and "said when it is started" in elsewhere.takes


def test_problems_are_parted_and_their_answers_found(model: Path, tmp_path: Path) -> None:
    data = data_file("grpo", "with steps", tmp_path, rows=150)
    written = init(model, data, stage="grpo", out=tmp_path / "a.yaml")
    run = load_config(tmp_path / "a.yaml").config
    task = run.stages[0].task  # type: ignore[attr-defined]
    assert (task.kind, task.answer_after, task.held_out) == ("file", "####", 0.2)
    assert run.evaluations[0].task == task and run.evaluate_start  # type: ignore[attr-defined]
    prompt = int(why(written)["stages.0.batch.seq_len"].split()[4])
    sampling = run.stages[0].sampling  # type: ignore[attr-defined]
    assert prompt + sampling.max_new_tokens <= run.stages[0].batch.seq_len <= 512
    (tmp_path / "apart").mkdir()
    apart = data_file("grpo", "with steps", tmp_path / "apart", rows=30)
    text = refused(tmp_path, model, data, stage="grpo", held_out=apart, out=tmp_path / "b.yaml")
    assert "which is trained on" in text


def test_columns_by_other_names(model: Path, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} and 1?", "answer": i + 1, "level": 2} for i in range(40)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"problems with columns: \{prompt: question\}"):
        init(model, data, stage="grpo", out=tmp_path / "none.yaml")
    named = {"prompt": "question"}
    init(model, data, stage="grpo", columns=named, out=tmp_path / "recipe.yaml")
    [stage] = load_config(tmp_path / "recipe.yaml").config.stages
    assert stage.task.columns == named  # type: ignore[attr-defined]


def test_prompts_that_leave_no_room(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "x" * 600, "answer": 1}) + "\n")
    assert "512" in refused(tmp_path, model, data, stage="grpo")
    data.write_text(json.dumps({"prompt": "x" * 600, "completion": "y"}) + "\n")
    assert "512" in refused(tmp_path, model, data, stage="sft")
    assert "--seq-len is 8" in refused(tmp_path, model, data, stage="sft", seq_len=8)


def test_disks_that_are_nearly_full(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_file("sft", "messages", tmp_path)
    size = 12 * open_start(str(model)).config.num_parameters()

    def free(number: int) -> None:
        usage = SimpleNamespace(free=number)
        monkeypatch.setattr("shardwise.recipes.choices.shutil.disk_usage", lambda _: usage)

    free(2 * size)
    init(model, data, stage="sft", out=tmp_path / "a.yaml")
    saved = load_config(tmp_path / "a.yaml").config.stages[0].checkpoint
    assert (saved.every, saved.keep, saved.keep_best) == (0, 1, False)
    free(size - 1)
    assert "--adapter lora" in refused(tmp_path, model, data, stage="sft")
    init(model, data, stage="sft", adapter="lora", out=tmp_path / "b.yaml")
    free(4 * size)
    init(model, data, stage="sft", out=tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml").config.stages[0].checkpoint.every > 0


def test_names_on_the_hub(hub_cache: HubCache, model: Path, tmp_path: Path) -> None:
    data = data_file("sft", "alpaca", tmp_path)
    hub_cache.add("org/model", model)
    hub_cache.add("org/data", {"data/train.jsonl": data.read_bytes()}, kind="dataset")
    out = tmp_path / "a.yaml"
    init("hf:org/model", "hf:org/data", stage="sft", out=out)
    run = load_config(out).config
    assert str(run.init_from) == "hf:org/model"
    assert str(run.stages[0].data.sources[0].path) == "hf:org/data"  # type: ignore[attr-defined]
    text = refused(tmp_path, "hf:org/model", "hf:org/other", stage="sft")
    assert "hf:org/other" in text and "not in the cache" in text


def refused(tmp_path: Path, *args: Any, **options: Any) -> str:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        init(*args, **{"out": tmp_path / "recipe.yaml", **options})
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "something was written"
    assert error.value.exit_code == 2
    return str(error.value)


def test_what_does_not_fit_is_told_with_what_would(large: Path, tmp_path: Path) -> None:
    data = data_file("sft", "messages", tmp_path)
    text = refused(tmp_path, large, data, stage="sft", gpu_memory=24)
    assert "parameters do not fit" in text and "GiB a rank at least" in text
    assert "--adapter qlora (" in text and "--ranks 8 of the same memory each (" in text
    init(large, data, stage="sft", gpu_memory=24, adapter="qlora", out=tmp_path / "q.yaml")
    init(large, data, stage="sft", gpu_memory=24, ranks=8, out=tmp_path / "r.yaml")
    text = refused(tmp_path, large, data, stage="sft", gpu_memory=2)
    assert "--adapter" not in text


@pytest.mark.parametrize(
    "stage,form,fits",
    [
        ("dpo", "preference", "--stage dpo or reward"),
        ("pretrain", "documents", "--stage pretrain"),
    ],
)
def test_data_of_another_stage(
    model: Path, tmp_path: Path, stage: str, form: str, fits: str
) -> None:
    data = data_file(stage, form, tmp_path)
    text = refused(tmp_path, model, data, stage="sft")
    assert str(data) in text and f"holds {form}" in text and fits in text


def test_answers_with_labels_train_no_reward_model(model: Path, tmp_path: Path) -> None:
    data = data_file("dpo", "unpaired", tmp_path)
    assert "--stage dpo learns from labels" in refused(tmp_path, model, data, stage="reward")


def test_columns_that_tell_nothing(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "odd.jsonl"
    data.write_text('{"question": "a", "response": "b"}\n' * 9)
    text = refused(tmp_path, model, data, stage="sft")
    assert "question, response" in text and "columns" in text


@pytest.mark.parametrize(
    "content,said", [("", "empty"), ("{}\n", "columns"), ("no json\n", "JSON")]
)
def test_data_that_are_none(model: Path, tmp_path: Path, content: str, said: str) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(content)
    text = refused(tmp_path, model, data, stage="sft")
    assert str(data) in text and said in text


def test_models_that_are_none(model: Path, tmp_path: Path) -> None:
    data = data_file("sft", "messages", tmp_path)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaX"]}')
    ByteTokenizer().save(strange)
    assert "mamba" in refused(tmp_path, strange, data, stage="sft")
    assert "does not exist" in refused(tmp_path, tmp_path / "nowhere", data, stage="sft")
    text = refused(tmp_path, "hf:nobody/nothing", data, stage="sft")
    assert "hf:nobody/nothing" in text and "HF_HUB_OFFLINE" in text
    for file in model.iterdir():
        if "tokenizer" not in file.name:
            (strange / file.name).write_bytes(file.read_bytes())
    for file in strange.glob("*tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(tmp_path, strange, data, stage="sft")


def test_a_recipe_that_is_there_stays(model: Path, tmp_path: Path) -> None:
    data, out = data_file("sft", "messages", tmp_path), tmp_path / "recipe.yaml"
    out.write_text("mine")
    assert "--force" in refused(tmp_path, model, data, stage="sft")
    assert out.read_text() == "mine"
    init(model, data, stage="sft", out=out, force=True)
    assert load_config(out).config.stages[0].kind == "sft"


@pytest.mark.parametrize(
    "options,said",
    [
        ({"stage": "ppo"}, "--stage ppo"),
        ({"adapter": "dora"}, "--adapter dora"),
        ({"seq_len": 0}, "--seq-len 0"),
        ({"epochs": 0.0}, "--epochs 0"),
        ({"ranks": 0}, "--ranks 0"),
        ({"out": Path("nowhere/a.yaml")}, "nowhere"),
        ({"out": Path("a.txt")}, "ends in .yaml"),
        ({"seq_len": 513}, "513"),
    ],
)
def test_bad_options(model: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    data = data_file("sft", "messages", tmp_path)
    assert said in refused(tmp_path, model, data, **{"stage": "sft", **options})

"""lm-eval's tasks on our engine give what lm-eval's own model gives on the exported folder."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, processors

from shardwise.config.load import load_config
from shardwise.errors import ConfigError, UserError
from shardwise.stages.evaluate import evaluate
from shardwise.stages.run import preflight
from tests.models.test_travel import write_folder
from tests.stages.recipes import recipe
from tests.support.pool import RankPool

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)

ROWS = [
    {"question": "The sky is", "choices": ["blue", "a large number", "up"], "answer": 0},
    {"question": "Two and two are ", "choices": ["five", "four", "many more"], "answer": 1},
    {"question": "A dog\n", "choices": ["barks", "meows", "reads"], "answer": 2},
    {"question": "long " * 40, "choices": ["end", "begin", "go on"], "answer": 0},
    {"question": "<s>user now<end>", "choices": ["yes", "no", "<end>"], "answer": 1},
]


def write_tasks(folder: Path) -> list[str]:
    """A task of each of the three kinds of request, over one file."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    tasks: dict[str, dict[str, Any]] = {
        "toy_choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "toy_texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "toy_answers": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["q", " "], "max_gen_toks": 9, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.dump({"task": name, **common, **task}))
    return [str(folder / f"{name}.yaml") for name in tasks]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the datasets library may write."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def ours(folder: Path, asked: list[dict[str, Any]], cache: Path) -> tuple[Any, dict[str, Any]]:
    """In a rank: lm-eval's answers with samples, and all figures of the evaluations."""
    import datasets

    from shardwise.stages import harness

    datasets.config.HF_DATASETS_CACHE = str(cache)
    seen: dict[str, Any] = {}
    measure = harness.measure

    def watched(config: Any, ctx: Any, engine: Any) -> dict[str, Any]:
        seen.update(measure(config, ctx, engine, samples=True))
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "measure", watched)
        return seen, evaluate(folder, evaluations=asked)


def theirs(folder: Path, tasks: list[str], **said: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_defaults=False)
    found: dict[str, Any] = simple_evaluate(model, tasks=tasks, task_manager=manager, **said)
    return found


def with_bos(folder: Path) -> None:
    """The folder's tokenizer begins every text."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)]
    )
    backend.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said = json.loads((folder / name).read_text()) | {"bos_token": "<s>"}
        (folder / name).write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("texts", "world"), [("raw", 2), pytest.param("chat", 1, marks=pytest.mark.slow)]
)
def test_figures_and_samples_are_the_librarys_own(
    ranks: RankPool, tmp_path: Path, texts: str, world: int, cache: None
) -> None:
    write_folder(folder := tmp_path / "hf")
    tasks = write_tasks(tmp_path)
    if texts == "raw":
        with_bos(folder)
    else:
        del tasks[1]  # whole texts are not asked
    wanted = theirs(folder, tasks, apply_chat_template=texts == "chat")
    choices = {"kind": "multiple_choice", "path": str(tmp_path / "rows.jsonl"), "texts": "raw"}
    asked = [{"kind": "lm_eval", "tasks": tasks, "texts": texts}, choices]
    for found, figures in ranks.run(ours, folder, asked, tmp_path / "cache", world=world):
        for task, row in wanted["results"].items():
            numbers = {k: v for k, v in row.items() if isinstance(v, float)}
            assert {k: found["results"][task][k] for k in numbers} == pytest.approx(numbers), task
            for name, value in numbers.items():
                assert figures[f"{task}.{name.removesuffix(',none')}"] == pytest.approx(value)
        for task, samples in wanted["samples"].items():
            for mine, other in zip(found["samples"][task], samples, strict=True):
                assert mine["doc"] == other["doc"]
                _alike(mine["filtered_resps"], other["filtered_resps"])
        if texts == "raw":  # our own evaluation of the same questions
            row = wanted["results"]["toy_choices"]
            assert figures["choice_accuracy"] == pytest.approx(row["acc,none"])
            assert figures["choice_accuracy_norm"] == pytest.approx(row["acc_norm,none"])


def _alike(mine: Any, other: Any) -> None:
    """Texts equal, log-probabilities within the rounding of fp32, greedy or not alike."""
    assert len(mine) == len(other)
    for a, b in zip(mine, other):
        if isinstance(b, str):
            assert a == b
        elif isinstance(b, (tuple, list)):
            assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-3)
            assert str(a[1]) == str(b[1])
        else:
            assert float(a) == pytest.approx(float(b), abs=1e-3)


def test_the_librarys_own_tasks_are_listed_where_they_are_asked(tmp_path: Path) -> None:
    from shardwise.stages import harness

    own, group = tmp_path / "own.yaml", tmp_path / "group.yaml"
    own.write_text("task: own\ndescription: |\n  group: no\n")
    group.write_text("group: both\ntask: [own, arc_easy]\n")
    assert harness._stands_alone(str(own))
    assert not harness._stands_alone(str(group)) and not harness._stands_alone("arc_easy")


def test_what_is_not_known_or_not_done_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwise.stages import harness
    from shardwise.stages.evaluation_configs import LmEvalConfig

    few = functools.partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: few())
    config = LmEvalConfig(kind="lm_eval", tasks=["no_such_task"])
    with pytest.raises(UserError, match=r"lm-eval .* has no task 'no_such_task'"):
        harness.measure(config, None, None)  # type: ignore[arg-type]
    said = {"until": "\n", "max_gen_toks": 5, "temperature": 0.0}
    sampling = harness.sampling_of(said | {"num_beams": 1}, "x")
    assert (sampling.greedy, sampling.max_new_tokens, sampling.stop_strings) == (True, 5, ("\n",))
    drawn = harness.sampling_of({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, "x")
    assert (drawn.greedy, drawn.temperature, drawn.top_p, drawn.max_new_tokens) == (
        False, 0.5, 0.9, 256,
    )  # fmt: skip
    with pytest.raises(UserError, match="generation_kwargs ask for num_beams"):
        harness.sampling_of(said | {"num_beams": 4}, "x")


def test_a_task_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    config["evaluations"] = [{"kind": "lm_eval", "tasks": [str(tmp_path / "none.yaml")]}]
    with pytest.raises(ConfigError, match=r"evaluations\.0\.kind .*none\.yaml: no such file"):
        loaded = load_config(config)
        preflight(loaded.config, 1, loaded.provenance)

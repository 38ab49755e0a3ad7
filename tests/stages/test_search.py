"""The jobs search and label_steps: the same data on any number of ranks, in any number of goes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.data import formats
from shardwise.errors import ConfigError
from shardwise.search.tree import from_record
from shardwise.stages.run import preflight
from shardwise.verify.jobs import compare_rows
from tests.stages.recipes import recipe
from tests.stages.search_job import made, run, run_and_die, run_with_odd_verifiers, written
from tests.support.daily import daily
from tests.support.pool import RankError, RankPool

LABELS = {
    "kind": "label_steps",
    "data": {"sources": [{"from": "search.answers"}]},
    "samples": 3,
    "step": {"separator": ";"},
    "sampling": {"max_new_tokens": 64, "stop_strings": ["\n"]},
    "reward": {"parts": [{"kind": "language"}]},
    "chunk": 3,
}


MODELS = [("process_reward", "process_reward_model"), ("reward", "reward_model")]


def rows(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize(
    ("kind", "native"),
    daily(
        [("best_of_n", False), ("beam", False), ("dvts", True), ("mcts", False), ("mcts", True)],
        *(0, 2, 4),
    ),
)
def test_files_are_the_same_on_any_ranks_and_after_a_kill(
    ranks: RankPool, tmp_path: Path, kind: str, native: bool
) -> None:
    ranks.run(run, made(tmp_path / "one", kind=kind, native=native), world=1)
    expected = written(tmp_path / "one")
    config = made(tmp_path / "two", kind=kind, native=native)
    ranks.run(run_and_die, config, 1, world=2)
    assert len(list((tmp_path / "two" / "stages" / "search" / "parts").iterdir())) == 1
    ranks.run(run, config, world=2)
    assert written(tmp_path / "two") == expected
    trees = [from_record(r) for r in rows(expected["trees"])]
    assert len(trees) == 5
    assert any(t.finished() for t in trees) and all(t.cost.drawn for t in trees)
    if kind == "mcts":
        assert all(t.nodes[0].visits == 12 or t.cost.drawn == 300 for t in trees)
        assert all(t.cost.drawn <= 300 for t in trees)


@pytest.mark.parametrize(("kind", "world"), daily([("mcts", 2), ("beam", 4)], 0))
def test_ranks_that_share_a_generator_write_the_same_files(
    ranks: RankPool, tmp_path: Path, kind: str, world: int
) -> None:
    """A reward that each rank would answer otherwise is the first's of those that share one."""
    for name, number in (("one", 1), ("many", world)):
        config = made(tmp_path / name, dict(LABELS), kind=kind)
        for job in config["stages"]:
            job["rollout"] = {"tp": min(number, 2), "max_slots": 5}
        config["engine"] |= {"precision": "fp64"}
        ranks.run(run_with_odd_verifiers, config, world=number)
    for job in ("search", "label_steps"):
        one, many = (written(tmp_path / name, job) for name in ("one", "many"))
        assert one.keys() == many.keys() and any(one.values())
        for file in one:
            differences = compare_rows({file: rows(one[file])}, {file: rows(many[file])})
            assert not any(d.is_bug for d in differences), file


def test_what_is_written_is_read(ranks: RankPool, tmp_path: Path) -> None:
    """Each artifact in its format; labels of the answers that were found, by more rollouts."""
    config = made(tmp_path / "run", LABELS)
    [summary] = ranks.run(run, config, world=1)
    search, labels = summary["stages"]
    assert {k: v["format"] for k, v in search["artifacts"].items()} == {
        "trees": "trees",
        "answers": "prompt-completion",
        "sft": "prompt-completion",
        "pairs": "preference",
        "steps": "steps",
        "problems": "problems",
    }
    assert search["metrics"]["tokens_drawn"] > 0
    assert 0 < search["metrics"]["shared_fraction"] < 1
    for name, artifact in search["artifacts"].items():
        if artifact["rows"] and name != "trees":
            path = tmp_path / "run" / artifact["path"]
            assert formats.detect(path).format == artifact["format"], name
    assert labels["inputs"]["search.answers"] == search["artifacts"]["answers"]["xxh3_128"]
    found = rows(written(tmp_path / "run", "label_steps")["steps"])
    answers = rows(written(tmp_path / "run")["answers"])
    assert found and len(found) <= len(answers)
    for row in found:
        assert len(row["steps"]) == len(row["labels"])
        assert all(0.0 <= x <= 1.0 for x in row["labels"])


def test_labels_are_the_same_after_a_kill(ranks: RankPool, tmp_path: Path) -> None:
    for name, world in (("one", 1), ("two", 2)):
        config = made(tmp_path / name, LABELS)
        if world == 2:
            ranks.run(run_and_die, config, 4, world=2)  # three chunks of the search, one of labels
        ranks.run(run, config, world=world)
    assert written(tmp_path / "one", "label_steps") == written(tmp_path / "two", "label_steps")


def test_a_solution_without_room_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    """Rollouts could not finish it, and its labels would say nothing."""
    row = {"prompt": "a", "completion": "b;" * 40, "answer": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    sources = {"data": {"sources": [{"path": str(tmp_path / "rows.jsonl")}]}}
    config = recipe(tmp_path / "run") | {"stages": [LABELS | sources]}
    with pytest.raises(
        RankError, match=r"rows\.jsonl: line 1.* sampling.max_new_tokens is 64; raise it"
    ):
        ranks.run(run, config, world=1)
    (tmp_path / "rows.jsonl").write_text(json.dumps({k: row[k] for k in row if k != "answer"}))
    with pytest.raises(RankError, match="field 'answer' is missing"):
        ranks.run(run, config, world=1)


@pytest.mark.parametrize(("stage", "kind"), MODELS)
def test_a_model_of_the_run_scores(ranks: RankPool, tmp_path: Path, stage: str, kind: str) -> None:
    """Its word stands at every step; the other kind of model is refused."""
    config = made(tmp_path / "run", kind="beam")
    [trained] = recipe(tmp_path / "run", stage)["stages"]
    config["stages"].insert(0, trained)
    config["stages"][1]["scorer"] = {"kind": kind, "model": stage}
    if kind == "process_reward_model":
        config["stages"][1]["scorer"]["steps"] = {"separator": ", "}
        config["stages"][1]["step"]["separator"] = ", "
    ranks.run(run, config, world=2)
    trees = [from_record(r) for r in rows(written(tmp_path / "run")["trees"])]
    scores = [n.scores[kind] for t in trees for n in t.nodes[1:] if kind in n.scores]
    assert scores and all(s is not None and 0 < s < 1 for s in scores)
    assert len(set(scores)) > len(scores) // 3
    assert all(t.cost.scored for t in trees)
    [other] = [k for s, k in MODELS if s != stage]
    config["stages"][1]["step"]["separator"] = "\n"
    config["stages"][1] |= {"scorer": {"kind": other, "model": stage}, "name": "again"}
    with pytest.raises(RankError, match=f"read otherwise; write kind: {kind}"):
        ranks.run(run, config, world=1)


def separated(folder: Path, model: str, scorer: str, step: str, kind: str) -> dict[str, Any]:
    """A recipe that searches with a model of steps, whose stage cuts them at a comma."""
    config = made(folder, kind=kind)
    [trained] = recipe(folder, "process_reward")["stages"]
    config["stages"][0]["step"]["separator"] = step
    steps = {"separator": scorer}
    judge = {"kind": "process_reward_model", "model": model, "steps": steps}
    config["stages"][0]["scorer"] = judge
    if model == "process_reward":
        config["stages"].insert(0, trained)
    return config


@pytest.mark.parametrize(
    ("scorer", "step", "kind", "words"),
    [
        (", ", ", ", "beam", ""),
        (", ", ";", "best_of_n", ""),
        ("; ", ", ", "mcts", r"stages.1.scorer.steps.separator.*'; ' ends .*', ' \(step.separator"),
        (";", ";", "dvts", r"stages.1.scorer.steps.separator .*';', and process_reward was"),
        (";", ", ", "best_of_n", r"trained with data.separator ', '; write ', '"),
        ("", ", ", "beam", r"trained with data.separator ', '"),
    ],
)
def test_steps_are_cut_as_the_scorer_was_trained(
    tmp_path: Path, scorer: str, step: str, kind: str, words: str
) -> None:
    config = separated(tmp_path, "process_reward", scorer, step, kind)
    refused = pytest.raises(ConfigError, match=words) if words else contextlib.nullcontext()
    with refused:
        loaded = load_config(config)
        preflight(loaded.config, 1, loaded.provenance)


def test_steps_are_cut_as_a_checkpoint_says(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run, recipe(tmp_path / "prm", "process_reward"), world=1)
    model = str(tmp_path / "prm" / "stages" / "process_reward" / "checkpoints")
    loaded = load_config(separated(tmp_path / "run", model, ", ", ", ", "beam"))
    preflight(loaded.config, 1, loaded.provenance)
    loaded = load_config(separated(tmp_path / "run", model, ";", ";", "beam"))
    with pytest.raises(ConfigError, match=r"checkpoints was trained with data.separator ', '"):
        preflight(loaded.config, 1, loaded.provenance)


def test_another_method_is_another_job(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run_and_die, made(tmp_path / "run"), 1, world=1)
    with pytest.raises(RankError, match="parts were made with another config"):
        ranks.run(run, made(tmp_path / "run", kind="beam"), world=1)


def test_searches_share_draws_by_name(ranks: RankPool, tmp_path: Path) -> None:
    config = made(tmp_path, kind="best_of_n")
    [one] = config["stages"]
    vote = {"method": {"kind": "best_of_n", "samples": 4, "choose": "majority"}, "scorer": None}
    same, own = {"name": "same", "draws": "search"}, {"name": "own"}
    config["stages"] += [{**one, **vote, **same}, {**one, **vote, **own}]
    ranks.run(run, config, world=1)
    first, same, own = (
        [
            [n["token_ids"] for n in tree["nodes"][1:5]]
            for tree in rows(written(tmp_path, j)["trees"])
        ]
        for j in ("search", "same", "own")
    )
    assert first == same != own


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scorer": None}, "stages.0.scorer.*mcts needs a scorer"),
        ({"scorer": {"kind": "verifier"}}, "rollouts carry its verdict to steps"),
        ({"sampling": {"greedy": True}}, "stages.0.sampling.greedy.*nothing branches"),
        ({"extract": {"lowest_solve_rate": 0.9, "highest_solve_rate": 0.1}}, "nothing is between"),
        ({"method": {"kind": "bfs"}}, "best_of_n"),
        (
            {"scorer": {"kind": "rules"}},
            "arithmetic takes the right answer to judge; with rules: countdown, sudoku",
        ),
        (
            {
                "method": {"kind": "best_of_n", "stop_at": 1.0},
                "scorer": {"kind": "self_consistency"},
            },
            "scorer.*stop_at waits for a score of a single answer",
        ),
        (
            {"method": {"kind": "beam"}, "extract": {"worth": "value"}},
            "only mcts backs values up",
        ),
    ],
)
def test_recipes_that_cannot_search(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    config = made(tmp_path)
    config["stages"][0] |= changes
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        load_config(config)


def test_a_scorer_that_is_no_model(ranks: RankPool, tmp_path: Path) -> None:
    config = made(tmp_path / "run")
    steps = {"separator": ";"}
    judge = {"kind": "process_reward_model", "model": "prm", "steps": steps}
    config["stages"][0]["scorer"] = judge
    with pytest.raises(RankError, match=r"neither an earlier stage .none. nor a model"):
        ranks.run(run, config, world=1)

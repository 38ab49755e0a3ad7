"""What is taken out of trees, through the readers that training uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.schema import TokenizerConfig
from shardwise.data import formats
from shardwise.data.chat import CHATML
from shardwise.data.config import StepDataConfig
from shardwise.data.preferences import read_rankings
from shardwise.data.source import DataSource
from shardwise.data.steps import encode_solution, read_solutions, step_ends
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.rewards import FileTaskConfig
from shardwise.search import extract
from shardwise.search.config import BestOfNConfig, MctsConfig
from shardwise.search.tree import Node, Tree
from tests.search import fake


def right(path: Any) -> float:
    return float(path.text.endswith("b"))


def searched(kind: str = "mcts", number: int = 3) -> list[Tree]:
    config: Any = MctsConfig(simulations=30, expand=3)
    if kind == "best_of_n":
        config = BestOfNConfig(samples=12)
    scorer = fake.FakeScorer(right, samples=0 if kind == "best_of_n" else 2)
    return fake.search(config, trees=[fake.tree(i) for i in range(number)], scorer=scorer)


def written(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = load_tokenizer(TokenizerConfig(kind="bytes"))
    made.chat_template = CHATML
    return made


def test_sft_rows_are_right_and_read(tmp_path: Path) -> None:
    rows = [row for t in searched() for row in extract.sft_rows(t, "fake", most=2)]
    assert rows and all(row["completion"].endswith("b") for row in rows)
    texts = [(row["prompt"][0]["content"], row["completion"]) for row in rows]
    assert len(set(texts)) == len(texts)
    assert formats.detect(written(tmp_path, rows)).format == "prompt-completion"


@given(number=st.integers(0, 20))
def test_pairs_have_one_prefix(number: int) -> None:
    """Up to some step both answers are one; there they part, the better way first."""
    scorer = fake.FakeScorer(right, samples=2)
    [tree] = fake.search(MctsConfig(simulations=30), trees=[fake.tree(number)], scorer=scorer)
    estimate = extract.by_answers("fake")
    for row in extract.pairs(tree, "fake", estimate=estimate):
        chosen, rejected = row["chosen"].split("\n"), row["rejected"].split("\n")
        shared = sum(1 for i in range(3) if chosen[: i + 1] == rejected[: i + 1])
        assert right_text(row["chosen"]) and not right_text(row["rejected"])
        forks = [n.id for n in tree.nodes if tree.text(n.id).split() == chosen[:shared]]
        branches = [
            [c for f in forks for c in tree.children(f) if tree.text(c).split() == a[: shared + 1]]
            for a in (chosen, rejected)
        ]
        assert all(branches)
        best = max(estimate(tree, c) or 0.0 for c in branches[0])
        assert best >= min(estimate(tree, c) or 0.0 for c in branches[1])
        assert row["margin"] == 1.0


def right_text(text: str) -> bool:
    return text.endswith("b")


def test_every_pair_is_of_its_fork() -> None:
    """By hand: two forks, each with a good and a bad branch."""
    tree = fake.tree()
    steps = [(0, "x\n", ""), (0, "y\n", ""), (1, "1", "stop"), (1, "0", "stop"), (2, "0", "stop")]
    for i, (parent, text, reason) in enumerate(steps):
        scores: dict[str, float | None] = {"v": float(text)} if reason else {}
        tree.nodes.append(
            Node(i + 1, parent, [i], [-1.0], text, scores, terminal=bool(reason), reason=reason)
        )
    rows = list(extract.pairs(tree, "v", estimate=extract.by_answers("v")))
    said = [(row["chosen"], row["rejected"]) for row in rows]
    assert said == [("x\n1", "y\n0"), ("x\n1", "x\n0")]
    assert not list(extract.pairs(tree, "v", margin=0.8, estimate=extract.by_answers("v")))[1:]


def test_pairs_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    estimate = extract.by_answers("fake")
    rows = [r for t in searched(number=6) for r in extract.pairs(t, "fake", estimate=estimate)]
    path = written(tmp_path, rows)
    source = DataSource(kind="auto", path=path)
    read = list(read_rankings([source], tokenizer))
    assert rows and len(read) == len(rows)
    assert read[0].ratings[0] > read[0].ratings[1]


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_step_labels_stand_at_step_ends(labels: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A label is read at the token that ends its step, and is that step's."""
    trees = searched(number=4)
    estimate = extract.by_score("fake")
    rows = [row for t in trees for row in extract.step_rows(t, "\n", estimate, labels=labels)]
    assert rows
    by_text = {
        (t.prompt[0]["content"], t.text(n.id).strip()): n.scores["fake"]
        for t in trees
        for n in t.nodes
        if n.scores.get("fake") is not None
    }
    for row in rows:
        for n, label in enumerate(row["labels"]):
            value = by_text[row["prompt"][0]["content"], "\n".join(row["steps"][: n + 1])]
            assert value is not None
            assert label == (value if labels == "soft" else float(value > 0))
    path = written(tmp_path, rows)
    source = DataSource(kind="steps", path=path)
    read = list(read_solutions([source], tokenizer, StepDataConfig().reading(1000)))
    assert [s.labels for s in read] == [row["labels"] for row in rows]
    for solution, row in zip(read, rows, strict=True):
        ends = [tokenizer.decode(solution.answer[: e + 1]) for e in solution.ends]
        for n, end in enumerate(ends[:-1]):
            assert end == "\n".join(row["steps"][: n + 1]) + "\n"


@given(
    pieces=st.lists(st.text(alphabet="ab \n", min_size=1, max_size=4), min_size=1, max_size=6),
    separator=st.sampled_from(["\n", "\n\n"]),
)
def test_steps_are_those_of_the_reader(pieces: list[str], separator: str) -> None:
    """Whatever the nodes are cut into: steps, and the nodes that hold their last tokens."""
    tokenizer = load_tokenizer(TokenizerConfig(kind="bytes"))
    tree = fake.tree()
    for i, piece in enumerate(pieces):
        tree.nodes.append(Node(i + 1, i, tokenizer.encode(piece), text=piece))
    tree.nodes[-1].reason, tree.nodes[-1].terminal = "stop", True
    if not (text := tree.text(len(pieces))).strip():
        return
    found = extract.step_nodes(tree, len(pieces), separator)
    ids = tree.tokens(len(pieces))
    ends = step_ends(tokenizer, ids, separator)
    assert [s for s, _ in found] == [s for s in text.split(separator) if s.strip()]
    owners = [n.id for n in tree.path(len(pieces)) for _ in n.token_ids]
    assert [node for _, node in found[:-1]] == [owners[e] for e in ends[:-1]][: len(found) - 1]
    assert found[-1][1] == len(pieces)


def test_problems_by_difficulty(tmp_path: Path) -> None:
    trees = searched("best_of_n", 6)
    rates = [extract.solve_rate(t, "fake") for t in trees]
    rows = [extract.problem_row(t, "fake", lowest=0.3, highest=0.5) for t in trees]
    for tree, rate, row in zip(trees, rates, rows, strict=True):
        ends = [tree.text(i).endswith("b") for i in tree.finished()]
        assert rate == sum(ends) / len(ends)
        assert (row is not None) == (0.3 <= rate <= 0.5)
    kept = [row for row in rows if row is not None]
    assert 0 < len(kept) < 6
    task = FileTaskConfig(kind="file", path=written(tmp_path, kept), held_out=0.0)
    problems = list(task.problems("train_rl"))
    assert [p.question for p in problems] == [row["prompt"] for row in kept]
    assert [p.answer for p in problems] == ["b b b"] * len(kept)
    assert problems[0].meta == {"n": kept[0]["n"], "solve_rate": kept[0]["solve_rate"]}


def test_encoded_labels_are_not_one_token_off(tokenizer: Tokenizer) -> None:
    """The node that a label is of ends with the token at which the label stands."""
    [tree] = searched(number=1)
    end = tree.finished()[0]
    nodes = extract.step_nodes(tree, end, "\n")
    steps = [step for step, _ in nodes]
    solution = encode_solution(tokenizer, tree.prompt, steps, [1.0] * len(steps), "\n")
    for (_, node), at in zip(nodes[:-1], solution.ends):
        assert tokenizer.decode(solution.answer[: at + 1]) == tree.text(node)


def test_nodes_of_a_solution_end_with_its_steps() -> None:
    """So that rollouts go on from where the label will stand."""
    tokenizer = load_tokenizer(TokenizerConfig(kind="bytes"))
    tokenizer.chat_template = CHATML
    steps = ["2 + 2 = 4", "4 + 1 = 5", "5"]
    prompt = [{"role": "user", "content": "2 + 2 + 1?"}]
    encoded = encode_solution(tokenizer, prompt, steps, [0.0] * 3, "\n")
    nodes = extract.solution_nodes(encoded, tokenizer.decode)
    assert [n.text for n in nodes][:2] == ["2 + 2 = 4\n", "4 + 1 = 5\n"]
    assert [t for n in nodes for t in n.token_ids] == encoded.answer
    assert [(n.id, n.parent, n.reason, n.terminal) for n in nodes] == [
        (1, 0, "step", False),
        (2, 1, "step", False),
        (3, 2, "stop", True),
    ]

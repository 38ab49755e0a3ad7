"""Scorers: verifiers, votes, rollouts, and models with a scalar head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from shardwise.config.schema import TokenizerConfig
from shardwise.data.tokenizer import load_tokenizer
from shardwise.errors import CheckpointError, ConfigError
from shardwise.losses.config import StepScoresConfig
from shardwise.losses.scores import ANSWER_CHANCE, score_of
from shardwise.models import registry
from shardwise.rewards import Problem, RewardConfig, build_reward
from shardwise.rewards.rules import SUDOKU
from shardwise.rewards.scoring import NumericConfig
from shardwise.search.choose import choose, said, vote
from shardwise.search.config import AnyMethod, AnyScorer, BestOfNConfig, check_scorer
from shardwise.search.scorers import ByRules, Path, SelfConsistency, Verifier, mean_score
from shardwise.search.scoring_models import ModelScorer
from shardwise.search.tree import Node
from tests.search import fake
from tests.support import toy

BYTES = load_tokenizer(TokenizerConfig(kind="bytes"))


def path(text: str, answer: str = "4", prompt_id: int = 0) -> Path:
    problem = Problem("p", "2 + 2?", answer, {})
    return Path(problem, prompt_id, BYTES.encode("2 + 2?"), BYTES.encode(text), text, True)


def test_a_verifier_pays_what_the_reward_does() -> None:
    with build_reward(RewardConfig(parts=[NumericConfig()])) as reward:
        paths = [path("it is 4"), path("5"), path("4", answer="none")]
        assert Verifier(reward)(paths) == [1.0, 0.0, None]
        assert (Verifier(reward).name, Verifier(reward, 3).name) == ("verifier", "rollouts")


def test_what_cannot_be_scored_is_no_zero() -> None:
    assert mean_score([1.0, None, 0.0]) == 0.5
    assert mean_score([None]) is None is mean_score([])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("so 4.0", "4"), ("4", "4"), ("50%", "1/2"), ("0.5", "1/2"), ("none", None)],
)
def test_what_an_answer_says(text: str, expected: str | None) -> None:
    assert said(text, "last_number") == expected
    assert said("a  B", "whole") == said("A b", "whole") == "a b"


@given(votes=st.lists(st.sampled_from(["1", "2", None]), max_size=9))
def test_votes(votes: list[str | None]) -> None:
    found = vote(votes, [1.0] * len(votes))
    known = [v for v in votes if v is not None]
    if not known:
        assert found is None
        return
    assert found is not None
    assert votes.index(votes[found]) == found
    assert known.count(votes[found] or "") == max(known.count("1"), known.count("2"))
    if known.count("1") == known.count("2"):  # the first one
        assert votes[found] == known[0]


def test_choosing() -> None:
    tree = fake.tree()
    for i, (text, score) in enumerate([("1", 0.9), ("2", 0.4), ("2", 0.3), ("2", None)]):
        scores = {"v": score}
        tree.nodes.append(Node(i + 1, 0, [i], [-1.0], text, scores, terminal=True, reason="stop"))
    found = [choose(tree, how, "whole", "v") for how in ("best", "majority", "weighted")]
    assert found == [1, 2, 1]
    tree.nodes[2].scores["v"] = 0.7
    assert choose(tree, "weighted", "whole", "v") == 2
    assert choose(fake.tree(), "best", "whole", "v") is None


def test_self_consistency_knows_its_problem() -> None:
    scorer = SelfConsistency("last_number")
    one = [path("4"), path("4.0"), path("5"), path("none")]
    other = [path("4", prompt_id=1), path("6", prompt_id=1)]
    assert scorer(one) == [0.5, 0.5, 0.25, None]
    assert scorer([*one, *other]) == [*scorer(one), *scorer(other)] != scorer(other)
    [tree] = fake.search(
        BestOfNConfig(samples=20), scorer=SelfConsistency("whole"), engine=fake.FakeEngine(1, 2)
    )
    assert sum({n.text: n.scores["self_consistency"] for n in tree.nodes[1:]}.values()) == 1.0


def test_rules_score_beginnings_and_answers_without_the_answer() -> None:
    scorer = ByRules(SUDOKU, "answer")
    problem = Problem("p", "Solve 42.. ..24 .1.2 2..1", "unknown", {})
    said = [("4213 1", False), ("4211", False), ("4213 1324 3142 2431", True), ("4213", True)]
    paths = [Path(problem, 0, [], [], text, finished) for text, finished in said]
    assert scorer(paths) == [1.0, 0.0, 1.0, 0.0]


SCALAR = toy.llama(vocab_size=BYTES.vocab_size, max_seq_len=96, tie_embeddings=False).as_scalar()


def scorer(aggregate: Any = "min", **changes: Any) -> ModelScorer:
    torch.manual_seed(0)
    model = registry.build(SCALAR)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    score = ANSWER_CHANCE
    if aggregate is not None:
        score = score_of(StepScoresConfig(aggregate=aggregate), BYTES)
    options = {"vocab_size": BYTES.vocab_size, "weights": model.named_parameters()}
    return ModelScorer("prm", SCALAR, score=score, hf_names=False, **options | changes)


@pytest.mark.parametrize("aggregate", ["min", "product", "last", "mean", None])
def test_a_model_is_read_at_step_ends(aggregate: Any) -> None:
    made, one = scorer(aggregate), path("2 + 2\nis\n4")
    ids = torch.tensor([[*one.prompt_tokens, *one.token_ids]])
    with torch.no_grad():
        out = made.model(ids, torch.arange(ids.shape[1])[None])[0, :, 0].double()
    ends = [5, 8, 9]  # the line ends, and the answer's last token
    chances = torch.sigmoid(out[[len(one.prompt_tokens) + e for e in ends]]).tolist()
    assert len({round(c, 3) for c in chances}) == 3
    expected = {
        "min": min(chances),
        "product": float(np.prod(chances)),
        "last": chances[-1],
        "mean": float(np.mean(chances)),
        None: chances[-1],
    }
    assert made([one]) == pytest.approx([expected[aggregate]])


def test_company_changes_no_score() -> None:
    made, paths = scorer(), [path("a\nb" * n) for n in range(1, 9)]
    assert made(paths) == [made([p])[0] for p in paths]


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="vocabulary of 99"):
        ModelScorer("prm", of_99(), [], ANSWER_CHANCE, BYTES.vocab_size)
    with pytest.raises(ConfigError, match="writes text"):
        ModelScorer("prm", toy.llama(), [], ANSWER_CHANCE, 61)
    with pytest.raises(CheckpointError, match="did not arrive"):
        scorer(weights=[])
    with pytest.raises(CheckpointError, match="no parameter x"):
        scorer(weights=[("x", torch.ones(1))])


def of_99() -> Any:
    return SCALAR.model_copy(update={"vocab_size": 99})


# Config

METHOD: Any = TypeAdapter(AnyMethod)
SCORER: Any = TypeAdapter(AnyScorer)


@pytest.mark.parametrize("kind", ["beam", "dvts"])
def test_width_divides(kind: str) -> None:
    with pytest.raises(ValidationError, match="must divide samples, which is 10"):
        METHOD.validate_python({"kind": kind, "samples": 10, "width": 4})


def test_kinds_are_told_apart() -> None:
    with pytest.raises(ValidationError, match="'best_of_n', 'beam', 'dvts', 'mcts'"):
        METHOD.validate_python({"kind": "bfs"})
    with pytest.raises(ValidationError, match="exploration"):
        METHOD.validate_python({"kind": "best_of_n", "exploration": 1.0})


@pytest.mark.parametrize(
    ("method", "judge", "message"),
    [
        ({"kind": "mcts"}, None, "mcts needs a scorer"),
        ({"kind": "best_of_n"}, None, "or choose: majority"),
        ({"kind": "best_of_n", "choose": "majority"}, None, ""),
        ({"kind": "best_of_n"}, {"kind": "verifier"}, ""),
        ({"kind": "dvts"}, {"kind": "verifier"}, "rollouts carry its verdict to steps"),
        ({"kind": "beam"}, {"kind": "self_consistency"}, "compares finished answers"),
        ({"kind": "mcts"}, {"kind": "rollouts"}, ""),
        ({"kind": "beam"}, {"kind": "process_reward_model", "model": "prm"}, ""),
    ],
)
def test_who_may_score_what(method: Any, judge: Any, message: str) -> None:
    found = judge and SCORER.validate_python(judge)
    if not message:
        check_scorer(METHOD.validate_python(method), found)
        return
    with pytest.raises(ValueError, match=message):
        check_scorer(METHOD.validate_python(method), found)


def test_the_config_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, shardwise.search.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Jobs are verified: the same rows on any layout, and what differs is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import shardwise
from shardwise.config.load import load_config
from shardwise.rollout import generator
from shardwise.verify import jobs
from shardwise.verify.jobs import compare_rows
from tests.support.daily import daily
from tests.support.pool import RankPool

MODEL = {
    "family": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "ffn_size": 96, "max_seq_len": 256,
}  # fmt: skip


def recipe(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"model": MODEL, "engine": {"compile": False}, "stages": list(stages)}


def test_a_filter_keeps_the_same_rows_on_any_number_of_ranks(
    ranks: RankPool, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i % 7}", "completion": f"{i} apples", "score": i % 3} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    rules = [{"kind": "duplicates"}, {"kind": "quota", "per_prompt": 2}]
    job = {"kind": "filter", "data": {"sources": [{"path": str(file)}]}, "rules": rules}
    report = shardwise.verify(recipe(job), ["dp2", "tp2"], pool=ranks)
    assert [v.layout for v in report.verdicts] == ["dp2", "tp2"]
    assert all(v.passed and v.counts["rows"] > 40 for v in report.verdicts)


def test_rows_of_earlier_jobs_are_made_up(ranks: RankPool) -> None:
    first = {"kind": "filter", "name": "first", "data": {"sources": [{"path": "no.jsonl"}]}}
    against = {"kind": "duplicates", "against": [{"from": "first.dropped"}]}
    job = {"kind": "filter", "data": {"sources": [{"from": "first.kept"}]}, "rules": [against]}
    report = shardwise.verify(recipe(first, job), ["dp2"], stage="filter", pool=ranks)
    [verdict] = report.verdicts
    assert verdict.passed and verdict.stage == "filter", verdict.sentence()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e6, 1e6) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=4))
def test_rows_are_equal_to_themselves(rows: list[Any]) -> None:
    assert not any(d.is_bug for d in compare_rows({"trees": rows}, {"trees": rows}))


@pytest.mark.parametrize(
    ("found", "where"),
    [
        ({"token_ids": [1, 3], "value": 0.5}, "tokens trees row 0, token_ids 1"),
        ({"token_ids": [1, 2], "value": 0.5 + 1e-6}, "tree trees row 0, value"),
        ({"token_ids": [1], "value": 0.5}, "tokens trees row 0, token_ids 1"),
        ({"token_ids": [1, 2], "value": 1}, "tree trees row 0, value"),
        ({"token_ids": [1, 2]}, "tree trees row 0, value"),
        ({"token_ids": [1, 3], "value": 0.5, "policy": "b"}, "version trees row 0, policy"),
    ],
)
def test_what_differs_is_named(found: Any, where: str) -> None:
    wanted = {"token_ids": [1, 2], "value": 0.5}
    bugs = [d for d in compare_rows({"trees": [wanted]}, {"trees": [found]}) if d.is_bug]
    assert f"{bugs[0].kind} {bugs[0].name}" == where
    assert not any(d.is_bug for d in compare_rows({"t": [wanted]}, {"t": [wanted]}))


def test_rounding_in_fp64_is_no_bug() -> None:
    [found] = compare_rows({"t": [0.5]}, {"t": [0.5 + 1e-12]})
    assert 0 < found.ratio < 1


@pytest.mark.parametrize("layout", daily(["dp2", "tp2"], 1))
def test_a_search_is_judged_on_trees_with_values(ranks: RankPool, layout: str) -> None:
    job = {
        "kind": "search",
        "method": {"kind": "mcts", "simulations": 6, "expand": 2},
        "scorer": {"kind": "rollouts", "samples": 2},
    }
    [verdict] = shardwise.verify(recipe(job), [layout], pool=ranks).verdicts
    assert verdict.passed, verdict.sentence()
    assert {"version", "tokens", "logprobs", "scores", "tree", "rows"} == verdict.counts.keys()


def test_a_value_that_depends_on_the_rank_is_caught(ranks: RankPool) -> None:
    job = {"kind": "search", "method": {"kind": "best_of_n", "samples": 3, "choose": "majority"}}
    with mock.patch("shardwise.verify.jobs.run_in_two", _run_with_other_dice):
        [verdict, *_] = shardwise.verify(recipe(job), ["dp2"], pool=ranks).verdicts
    assert not verdict.passed and verdict.first is not None
    assert "trees row" in verdict.first.name


def _run_with_other_dice(config: dict[str, Any], job: str) -> None:
    """In a rank: draws that are keyed by the rank, as if it were part of their name."""
    uniform = generator.row_keys
    with mock.patch.object(
        generator, "row_keys", lambda key, *ids: uniform(key + dist.get_rank(), *ids)
    ):
        jobs.run_rank(load_config(config))

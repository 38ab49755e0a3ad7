"""Lengths of data: of all rows, or of some that are spread evenly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shardwise.data.source import DataSource
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.recipes import lengths
from shardwise.recipes.lengths import Lengths, fitting, of_conversations, of_documents


def of(*own: int) -> Lengths:
    return Lengths(len(own), np.asarray(own), np.asarray(own))


@pytest.mark.parametrize(
    "own,most,expected",
    [
        ([10] * 5, 512, 64),
        ([10] * 99 + [100], 512, 128),  # the longest is no outlier of nobody's length
        ([100] * 99 + [190], 512, 192),
        ([100] * 199 + [500], 512, 128),
        ([100] * 9 + [500], 512, 512),  # one in ten is no exception
        ([600] * 5, 512, 512),
        ([64], 64, 64),
    ],
)
def test_a_row_length(own: list[int], most: int, expected: int) -> None:
    assert fitting(of(*own), most) == expected


def test_quantiles_and_shares() -> None:
    found = of(*range(1, 101))
    assert (found.at(0.95), found.longest, found.share(50)) == (96, 100, 0.5)
    assert found.looked == "the 100 rows"
    assert Lengths(1000, found.own, found.row).tokens == 50_500
    assert Lengths(1000, found.own, found.row).looked == "100 of the 1,000 rows"


def test_many_rows_are_looked_at_here_and_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "SAMPLE", 10)
    rows = [
        {"messages": [{"role": "user", "content": "x" * i}, {"role": "assistant", "content": "y"}]}
        for i in range(1, 41)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource.model_validate({"kind": "messages", "path": file})
    some, every = (of_conversations(source, n, ByteTokenizer()) for n in (40, 10))
    assert (len(some.own), some.rows, len(every.own)) == (10, 40, 40)
    assert some.own.tolist() == every.own[::4].tolist()
    assert abs(some.tokens - every.own.sum()) < 0.1 * every.own.sum()


def test_long_documents_are_told_by_their_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "HEAD", 100)
    for name, size in (("a", 50), ("b", 1000)):
        (tmp_path / f"{name}.txt").write_text("z" * size)
    source = DataSource.model_validate({"kind": "text", "path": tmp_path / "*.txt"})
    found = of_documents(source, 2, ByteTokenizer())
    assert found.own.tolist() == [51, 1001]
    assert found.draws.shape == (2,) and ((found.draws >= 0) & (found.draws < 1)).all()

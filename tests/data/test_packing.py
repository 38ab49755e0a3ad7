"""Packing: nothing leaks, nothing is lost, and the end token is learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from shardwise.data.packing import (
    Example,
    PackedExamples,
    PackedRows,
    Row,
    SlidingRows,
    best_fit,
    collate,
)
from shardwise.errors import DataError, UserError

BOS, EOS, PAD = 1, 2, 3
# Documents may contain the ids of BOS, EOS and PAD: nothing may be inferred from ids.
DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=25), min_size=1, max_size=12)


def rows_of(
    documents: Sequence[ArrayLike], seq_len: int, start_id: int, eos_id: int, pad_id: int
) -> PackedRows:
    """Rows over token lists; EOS is appended to each."""
    arrays = [np.append(np.asarray(d, dtype=np.int64), eos_id) for d in documents]
    starts = np.cumsum([0, *(a.size for a in arrays)])
    return PackedRows(np.concatenate(arrays), starts, seq_len, start_id, pad_id)


def pieces(row: Row) -> list[tuple[list[int], list[int], bool]]:
    """(inputs, targets, valid) of each segment of a row, having checked its shape."""
    segments = row.segment_ids
    assert segments[0] == 0 and set(np.diff(segments)) <= {0, 1}
    out = []
    for s in range(segments[-1] + 1):
        here = segments == s
        # Positions restart in each segment and count up from 0.
        assert row.position_ids[here].tolist() == list(range(here.sum()))
        mask = row.loss_mask[here]
        assert mask.all() or not mask.any()
        out.append((row.input_ids[here].tolist(), row.targets[here].tolist(), bool(mask[0])))
    return out


@given(DOCUMENTS, st.integers(1, 16))
def test_documents_can_be_read_back_from_rows(docs: list[list[int]], seq_len: int) -> None:
    packed = rows_of(docs, seq_len, BOS, EOS, PAD)
    assert packed.num_rows == -(-sum(len(d) + 1 for d in docs) // seq_len)
    flat: list[int] = []
    for i in range(packed.num_rows):
        for inputs, targets, valid in pieces(packed.row(i)):
            if not valid:  # padding: only at the very end
                assert i == packed.num_rows - 1 and set(inputs) == set(targets) == {PAD}
                continue
            flat += targets
            # Within a segment each input is the target before it: prediction never crosses over.
            assert inputs[1:] == targets[:-1]
    assert flat == [t for d in docs for t in [*d, EOS]]


@given(DOCUMENTS, st.integers(1, 16))
def test_segments_are_documents(docs: list[list[int]], seq_len: int) -> None:
    """Each lies in one document, opens with BOS at its start and ends on EOS at its end."""
    packed = rows_of(docs, seq_len, BOS, EOS, PAD)
    queue = [(d, t) for d, ids in enumerate(docs) for t in range(len(ids) + 1)]
    previous = None
    for i in range(packed.num_rows):
        row = packed.row(i)
        documents = set()
        for inputs, targets, valid in pieces(row):
            if not valid:
                continue
            mine, queue = queue[: len(targets)], queue[len(targets) :]
            owners = {d for d, _ in mine}
            assert len(owners) == 1
            documents |= owners
            doc, first = mine[0]
            assert inputs[0] == (BOS if first == 0 else docs[doc][first - 1])
            last = mine[-1][1]
            assert targets[-1] == (EOS if last == len(docs[doc]) else docs[doc][last])
        assert row.num_documents == len(documents)
        previous = row
    assert not queue and previous is not None


def test_a_row_by_hand() -> None:
    packed = rows_of([[10, 11], [], [20, 21, 22]], 5, BOS, EOS, PAD)
    first, second = packed.row(0), packed.row(1)
    assert first.input_ids.tolist() == [BOS, 10, 11, BOS, BOS]
    assert first.targets.tolist() == [10, 11, EOS, EOS, 20]
    assert first.position_ids.tolist() == [0, 1, 2, 0, 0]
    assert first.segment_ids.tolist() == [0, 0, 0, 1, 2]
    assert second.input_ids.tolist() == [20, 21, 22, PAD, PAD]
    assert second.targets.tolist() == [21, 22, EOS, PAD, PAD]
    assert second.loss_mask.tolist() == [True] * 3 + [False] * 2
    assert second.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert (first.num_documents, second.num_documents) == (3, 1)


def test_rows_of_a_store_with_empty_documents() -> None:
    """Foreign stores may hold documents of no token at all."""
    tokens, starts = np.array([5, 6, 7], dtype=np.uint16), np.array([0, 0, 2, 2, 3, 3])
    row = PackedRows(tokens, starts, 4, BOS, PAD).row(0)
    assert row.input_ids.tolist() == [BOS, 5, BOS, PAD]
    assert row.segment_ids.tolist() == [0, 0, 1, 2]


def test_refusals() -> None:
    with pytest.raises(DataError, match="no tokens"):
        PackedRows(np.array([], dtype=np.uint16), np.array([0, 0]), 4, BOS, PAD)
    with pytest.raises(UserError, match="seq_len"):
        rows_of([[1]], 0, BOS, EOS, PAD)
    with pytest.raises(IndexError):
        rows_of([[1]], 4, BOS, EOS, PAD).row(1)


def test_collate() -> None:
    packed = rows_of([[10, 11], [12], [13, 14, 15, 16]], 5, BOS, EOS, PAD)
    batch = collate([packed.row(0), packed.row(1)], [40, 41])
    assert batch.segment_ids_BT is not None and batch.segment_ids_BT.shape == (2, 5)
    assert batch.sample_ids_B.tolist() == [40, 41]
    assert batch.loss_mask_BT.dtype == torch.bool
    for name in ("input_ids_BT", "position_ids_BT", "targets_BT", "segment_ids_BT"):
        assert getattr(batch, name).dtype == torch.int64
    # Row 1 is one document and padding: a causal mask is enough.
    assert collate([packed.row(1)], [41]).segment_ids_BT is None


EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=13).filter(
        lambda e: any(m for _, m in e[1:])
    ),
    min_size=1,
    max_size=15,
)


@given(EXAMPLES, st.booleans())
def test_examples_can_be_read_back(raw: list, pack: bool) -> None:
    examples = [Example([i for i, _ in e], [m for _, m in e]) for e in raw]
    packed = PackedExamples(examples, 12, PAD, pack=pack)
    found = []
    for i in range(packed.num_rows):
        row = packed.row(i)
        for s in range(row.num_documents):
            here = row.segment_ids == s
            assert row.position_ids[here].tolist() == list(range(here.sum()))
            ids = [int(row.input_ids[here][0]), *row.targets[here].tolist()]
            assert row.input_ids[here].tolist() == ids[:-1]
            found.append((ids, row.loss_mask[here].tolist()))
        padding = row.segment_ids >= row.num_documents
        assert not row.loss_mask[padding].any() and set(row.targets[padding]) <= {PAD}
        if not pack:
            assert row.num_documents == 1
    assert sorted(found) == sorted((list(e.ids), list(e.loss_mask[1:])) for e in examples)
    assert packed.report.num_rows == packed.num_rows


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit(sizes: list[int]) -> None:
    rows = best_fit(sizes, 20)
    assert sorted(i for r in rows for i in r) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in r) <= 20 for r in rows)
    assert rows == best_fit(sizes, 20) == sorted(sorted(r) for r in rows)
    # First- and best-fit decreasing need at most 11/9 of the best packing and a bit.
    assert len(rows) <= 11 / 9 * -(-sum(sizes) // 20) * 1.5 + 1
    fullness = sorted(sum(sizes[i] for i in r) for r in rows)
    assert sum(f <= 10 for f in fullness) <= 1  # two half-empty rows would have been one


LONG = Example([5] * 9, [False] * 3 + [True] * 6)
SHORT = Example([6, 7, EOS], [False, True, True])
LATE = Example([5] * 9, [False] * 8 + [True])


def test_too_long_is_an_error_by_default() -> None:
    with pytest.raises(
        DataError, match=r"example 1 has 9 tokens, more than batch.seq_len \+ 1 = 6"
    ):
        PackedExamples([SHORT, LONG], 5, PAD)
    assert PackedExamples([SHORT, LONG], 8, PAD).report.num_truncated == 0


def test_too_long_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    cut = PackedExamples([SHORT, LONG, LATE], 5, PAD, too_long="truncate")
    assert (cut.report.num_truncated, cut.report.num_unlearnable, cut.report.num_dropped) == (
        2,
        1,
        0,
    )
    assert sum(cut.row(i).loss_mask.sum() for i in range(cut.num_rows)) == 2 + 3
    gone = PackedExamples([SHORT, LONG, LATE], 5, PAD, too_long="drop")
    assert (gone.report.num_truncated, gone.report.num_dropped, gone.num_rows) == (0, 2, 1)
    assert "num_dropped=2" in caplog.text
    with pytest.raises(DataError, match="none of 1 examples"):
        PackedExamples([LONG], 5, PAD, too_long="drop")


def test_mask_and_ids_must_agree() -> None:
    with pytest.raises(DataError, match="example 0: 2 ids but 1"):
        PackedExamples([Example([1, 2], [True])], 5, PAD)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seq_len=st.integers(1, 8),
    data=st.data(),
)
def test_sliding_rows_score_every_token_once_with_its_context(
    lengths: list[int], seq_len: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len))
    docs = [list(range(100 * i + 1, 100 * i + n + 1)) for i, n in enumerate(lengths)]
    rows = rows_of(docs, seq_len, start_id=0, eos_id=99, pad_id=98)
    sliding = SlidingRows(rows, stride)
    scored = [sliding.row(i) for i in range(sliding.num_rows)]
    found = [int(t) for r in scored for t in r.targets[r.loss_mask]]
    assert found == [t for d in docs for t in [*d, 99]]
    for row in scored[1:]:
        assert not row.loss_mask[: seq_len - stride].any()

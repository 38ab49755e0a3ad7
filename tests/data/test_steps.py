"""Answers in steps: where each ends as tokens, whatever is merged, and what is refused."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.data.chat import CHATML
from shardwise.data.config import StepDataConfig, StepReading
from shardwise.data.formats import detect
from shardwise.data.steps import (
    Solution,
    collate_solutions,
    encode_solution,
    read_solutions,
    step_ends,
    truncated,
)
from shardwise.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from shardwise.errors import DataError

PLAIN = ByteTokenizer(CHATML)
ASKED = [{"role": "user", "content": "2 + 2 + 1?"}]
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zs"]), min_size=1)


def words(tokenizer: Tokenizer, solution: Solution) -> list[str]:
    """What stands behind each step's end, up to the next."""
    starts = [0, *(end + 1 for end in solution.ends)]
    return [tokenizer.decode(solution.answer[a:b]) for a, b in itertools.pairwise(starts)]


@given(st.lists(WORDS.filter(lambda w: "\n" not in w and "<|" not in w), min_size=1, max_size=4))
def test_steps_end_behind_their_separator_and_the_last_with_the_end_token(steps: list[str]) -> None:
    made = encode_solution(PLAIN, ASKED, steps, [1.0] * len(steps), "\n")
    assert words(PLAIN, made) == [*(f"{s}\n" for s in steps[:-1]), steps[-1]]
    assert made.ends[-1] == len(made.answer) - 1
    assert PLAIN.token_of(made.answer[-1]) == "<|im_end|>"
    # A policy that writes the same is read at the same tokens.
    assert step_ends(PLAIN, made.answer, "\n") == made.ends


def test_the_tokenizer_may_merge_the_separator() -> None:
    merging = train_bpe(["one\n\ntwo\n\nthree\n\n" * 20], 300, chat_template=CHATML)
    made = encode_solution(merging, ASKED, ["one", "two", "three"], [1, 0, 0], "\n\n")
    assert words(merging, made) == ["one\n\n", "two\n\n", "three"]
    assert len(made.answer) < 10  # it does


def test_completions_without_order() -> None:
    """Blank steps are none, a blank end belongs to the step before, an empty answer is a step."""
    for text, ends in (
        ("a\n\nb", [1, 3]),
        ("a\n", [1]),
        ("\n\n", [1]),
        ("a", [0]),
        ("a\nb\n", [1, 3]),
    ):
        assert step_ends(PLAIN, PLAIN.encode(text), "\n") == ends
    assert step_ends(PLAIN, PLAIN.encode("abc"), "") == [0, 1, 2]
    euro = PLAIN.encode("1€2")  # a separator of three tokens
    assert step_ends(PLAIN, euro, "€") == [3, 4]


def write(folder: Path, *rows: dict[str, Any]) -> list[Any]:
    file = folder / "steps.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return StepDataConfig.model_validate({"sources": [{"path": file}]}).sources


ROW = {"prompt": "2 + 2 + 1?", "steps": ["2 + 2 = 4", "4 + 1 = 6"], "labels": [True, False]}


def test_rows_in_all_their_forms_are_one(tmp_path: Path) -> None:
    sources = write(
        tmp_path,
        ROW,
        ROW | {"steps": "2 + 2 = 4\n4 + 1 = 6", "labels": [1.0, 0]},
        ROW | {"prompt": ASKED},
    )
    made = list(read_solutions(sources, PLAIN, StepReading()))
    assert made[0] == made[1] == made[2]
    assert made[0].labels == [1.0, 0.0] and len(made[0].ends) == 2
    assert detect(sources[0].path).format == "steps"
    theirs = write(tmp_path, {"prompt": "?", "completions": ["a", "b"], "labels": [True, False]})
    with pytest.raises(DataError, match=r"near: steps with columns: \{steps: completions\}"):
        list(read_solutions(theirs, PLAIN, StepReading()))


SPANS = {
    "prompt": "?",
    "completion": "So 4, then 6.",
    "spans": [[3, 4], [11, 12]],
    "labels": [1, 0],
}


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_spans_end_where_their_last_word_does(parts: list[tuple[str, str]]) -> None:
    text, spans = "", []
    for unlabelled, labelled in parts:
        text += unlabelled
        spans.append([len(text), len(text) + len(labelled)])
        text += labelled
    if "<|" in text:
        return
    with tempfile.TemporaryDirectory() as folder:
        row = {"prompt": "?", "completion": text, "spans": spans, "labels": [1] * len(spans)}
        [made] = read_solutions(write(Path(folder), row), PLAIN, StepReading())
    *inside, last = made.ends
    assert [PLAIN.decode(made.answer[: end + 1]) for end in inside] == [
        text[:end] for _, end in spans[:-1]
    ]
    assert last == len(made.answer) - 1  # where an answer's last step is read, too


def test_spans_of_which_none_is_the_end(tmp_path: Path) -> None:
    sources = write(tmp_path, SPANS)
    [made] = read_solutions(sources, PLAIN, StepReading())
    assert [made.answer[end] for end in made.ends] == [ord("4"), ord("6")]
    assert made.labels == [1.0, 0.0]
    assert detect(sources[0].path).format == "steps"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": [1]}, "2 spans and 1 labels"),
        ({"spans": [[3, 4], [3, 12]]}, "before the one in front"),
        ({"spans": [[3, 4], [11, 14]]}, "beyond the completion's 13"),
        ({"spans": [[2, 3], [11, 12]]}, "is blank"),
        ({"spans": [[3, 4], [12, 11]]}, "is blank, before"),
        ({"spans": [3, 4]}, "no list of pairs"),
        ({"spans": [[True, 2]]}, "no list of pairs"),
        ({"completion": [{"role": "assistant", "content": "x"}]}, "is no text"),
        ({"steps": ["a", "b"]}, "not both"),
    ],
)
def test_what_are_no_spans_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"line 2, byte .*{said}"):
        list(read_solutions(write(tmp_path, SPANS, SPANS | change), PLAIN, StepReading()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": [1]}, "2 steps and 1 labels"),
        ({"labels": [1, "no"]}, "no list of numbers"),
        ({"labels": [1, float("nan")]}, "no list of numbers"),
        ({"labels": [1, -1]}, "no chances .0 to 1.; set data.hard_above"),
        ({"steps": ["a", " "]}, "a step without words"),
        ({"steps": ["a\nb", "c"]}, "a step holds data.separator"),
        ({"steps": 3, "labels": [1]}, "neither a text nor a list of texts"),
        ({"prompt": 3}, "neither a text nor a list of messages"),
    ],
)
def test_what_is_no_row_is_refused_with_its_line(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    sources = write(tmp_path, ROW, ROW | change)
    with pytest.raises(DataError, match=f"line 2, byte .*{said}"):
        list(read_solutions(sources, PLAIN, StepReading()))


def test_hard_labels_are_what_is_above_a_number(tmp_path: Path) -> None:
    sources = write(tmp_path, ROW | {"labels": [0, -1]})
    [made] = read_solutions(sources, PLAIN, StepReading(hard_above=-0.5))
    assert made.labels == [1.0, 0.0]


def test_long_rows_are_an_error_or_cut_behind_a_step_or_left_out(tmp_path: Path) -> None:
    sources = write(tmp_path, ROW)
    [whole] = read_solutions(sources, PLAIN, StepReading())
    longest = len(whole.prompt) + whole.ends[0] + 1
    assert truncated(whole, whole.num_tokens) == whole
    for room in (longest, longest + 1, whole.num_tokens - 1):
        [cut] = read_solutions(sources, PLAIN, StepReading(max_tokens=room, truncate=True))
        assert (cut.ends, cut.labels) == (whole.ends[:1], [1.0])
        assert cut.answer == whole.answer[: whole.ends[0] + 1]
    assert not list(
        read_solutions(sources, PLAIN, StepReading(max_tokens=longest - 1, truncate=True))
    )
    assert not list(read_solutions(sources, PLAIN, StepReading(max_tokens=longest, drop=True)))
    with pytest.raises(DataError, match=r"has .* tokens, batch.seq_len is"):
        list(read_solutions(sources, PLAIN, StepReading(max_tokens=longest)))


def test_scores_are_read_where_the_last_token_of_a_step_is_the_input() -> None:
    one = Solution([7, 8], [5, 6, 9, 4], [1, 3], [1.0, 0.25])
    two = Solution([7], [5], [0], [0.5])
    batch = collate_solutions([one, two], [0, 1], pad_id=9, num_real=2, pad_multiple=1)
    assert batch.input_ids_BT.tolist() == [[7, 8, 5, 6, 9, 4], [7, 5, 9, 9, 9, 9]]
    assert [m.nonzero().flatten().tolist() for m in batch.loss_mask_BT] == [[3, 5], [1]]
    assert batch.extras["label_BT"][batch.loss_mask_BT].tolist() == [1.0, 0.25, 0.5]
    assert float(batch.extras["label_BT"].sum()) == 1.75
    short = collate_solutions([one, two], [0, 1], pad_id=9, num_real=1)
    assert not short.loss_mask_BT[1].any()

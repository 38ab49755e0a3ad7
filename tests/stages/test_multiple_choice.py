"""Continuations are scored alike on every layout, and as the model's own logits say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shardwise.config.schema import NativeConfig
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import DataError
from shardwise.stages.evaluation_configs import MultipleChoiceConfig, Question
from shardwise.stages.multiple_choice import _pairs
from shardwise.stages.scoring import Pair, TextEncoder, score
from tests.support import toy
from tests.support.engines import engine, plain
from tests.support.pool import RankPool


def pairs() -> list[Pair]:
    """Of many lengths; some longer than the model takes."""
    g = torch.Generator().manual_seed(3)
    sizes = [(1, 1), (5, 3), (2, 9), (30, 4), (7, 1), (40, 2), (3, 3)]
    return [tuple(torch.randint(0, 61, (n,), generator=g).tolist() for n in size) for size in sizes]  # type: ignore[misc]


def scored(layout: str, precision: str = "fp64") -> list[tuple[float, bool]]:
    config = NativeConfig(layout=layout, precision=precision, compile=False)  # type: ignore[arg-type]
    return score(engine(config, toy.llama()), pairs(), 2, 32)


@pytest.mark.parametrize("layout", ["dp2", "tp2.sp", "pp2", "dp2.zero3"])
def test_every_layout_scores_alike(ranks: RankPool, layout: str) -> None:
    [wanted] = ranks.run(scored, "dp1", world=1)
    for found in ranks.run(scored, layout, world=2):
        for (mine, greedy), (sum_, hit) in zip(found, wanted, strict=True):
            assert mine == pytest.approx(sum_, rel=1e-9) and greedy == hit


def test_it_is_the_logits_word() -> None:
    oracle = plain(toy.llama())
    asked = pairs()
    with torch.no_grad():
        for i, (context, continuation) in enumerate(asked):
            ids = torch.tensor([[*context, *continuation][-33:]])
            logits = oracle.model(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None])
            logp = F.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[0, :, 0]
            likeliest = logits.argmax(-1)[0, -len(continuation) :]
            if i == 1:  # a continuation that greedy decoding writes
                asked[i] = (context, [int(likeliest[0])])
                logp = logits[0, len(context) - 1].log_softmax(-1).max()[None]
            [(found, greedy)] = score(oracle, asked[i : i + 1], 4, 32)
            assert found == pytest.approx(float(logp[-len(asked[i][1]) :].sum()), rel=1e-9)
            assert greedy == (i == 1 or likeliest.tolist() == continuation)


def test_texts_are_cut_where_a_continuation_begins() -> None:
    tokenizer = ByteTokenizer()
    encoder = TextEncoder(tokenizer)
    assert encoder.pair("ab ", "c") == (tokenizer.encode("ab"), tokenizer.encode(" c"))
    assert encoder.pair("", "c") == ([encoder.start_id], tokenizer.encode("c"))


def config(path: Path, **said: Any) -> MultipleChoiceConfig:
    return MultipleChoiceConfig(kind="multiple_choice", path=path, **said)


def test_a_chat_model_is_asked() -> None:
    question, tokenizer = Question("Why?", ("so", "no"), 0), ByteTokenizer()
    said = config(Path("x"), texts="chat", prompt="Q: {question} {question}")
    for (context, continuation), choice in zip(_pairs(question, said, tokenizer), ("so", "no")):
        text = tokenizer.decode(context, skip_special=False)
        assert "user\nQ: Why? Why?" in text and text.endswith("assistant\n")
        assert tokenizer.decode(continuation) == choice


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"question": "q", "choices": ["a", "bb"], "answer": 1}


def test_forms_of_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    arc = {"text": ["a", "bb"], "label": ["1", "2"]}
    write(
        file, GOOD, GOOD | {"answer": "B"}, GOOD | {"answer": " b"}, GOOD | {"answer": "1"},
        GOOD | {"choices": arc, "answer": "2"}, GOOD | {"note": "not read"},
    )  # fmt: skip
    assert config(file).questions() == [Question("q", ("a", "bb"), 1)] * 6
    theirs = {"ctx": "q", "endings": ["a", "bb"], "gold": 1}
    columns = {"question": "ctx", "choices": "endings", "answer": "gold"}
    assert config(write(file, theirs), columns=columns).questions()[0].text == "q"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": "q", "choices": ["a", "b"], "answer": 0}, "no field 'question'; fields: query"),
        (GOOD | {"question": " "}, "question must be a text"),
        (GOOD | {"choices": ["a"]}, "choices must be a list of at least two"),
        (GOOD | {"choices": ["a", ""]}, "choices must be a list of at least two"),
        (GOOD | {"answer": 2}, "answer is 2; allowed: an index from 0 to 1"),
        (GOOD | {"answer": "C"}, "answer is 'C'; .* a letter from A to B"),
        (GOOD | {"answer": True}, "answer is True"),
    ],
)
def test_what_is_no_question_is_told_by_file_and_line(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    file = write(tmp_path / "q.jsonl", GOOD, row)
    with pytest.raises(DataError, match=words) as error:
        config(file).check()
    assert str(error.value).startswith(f"{file}: line 2, ")

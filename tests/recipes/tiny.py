"""Tiny models of every family as folders, and little data in every format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shardwise.data.tokenizer import ByteTokenizer
from tests.models import families

POSITIONS = 512


def model_folder(family: str, folder: Path) -> Path:
    """A model of random weights that reads bytes, as transformers writes it."""
    tokenizer, like = ByteTokenizer(), families.hf_model(family)
    like.config.vocab_size = tokenizer.vocab_size
    like.config.max_position_embeddings = POSITIONS
    type(like)(like.config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def _asked(i: int) -> str:
    return f"How much is {i} plus {i % 7}?"


def _said(i: int) -> str:
    return f"It is {i + i % 7}."


def _turns(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": _asked(i)}, {"role": "assistant", "content": _said(i)}]


# A row of each format, by the stage that learns from it.
ROWS: dict[tuple[str, str], Callable[[int], dict[str, Any]]] = {
    ("pretrain", "documents"): lambda i: {"text": f"{_asked(i)} {_said(i)} " * (1 + i % 5)},
    ("sft", "messages"): lambda i: {"messages": _turns(i)},
    ("sft", "sharegpt"): lambda i: {
        "conversations": [{"from": "human", "value": _asked(i)}, {"from": "gpt", "value": _said(i)}]
    },
    ("sft", "alpaca"): lambda i: {
        "instruction": _asked(i), "input": "Be quick." * (i % 2), "output": _said(i)
    },
    ("sft", "prompt-completion"): lambda i: {"prompt": _asked(i), "completion": _said(i)},
    ("dpo", "preference"): lambda i: {
        "prompt": _asked(i), "chosen": _said(i), "rejected": _said(i + 1)
    },
    ("dpo", "conversational"): lambda i: {
        "chosen": _turns(i), "rejected": [_turns(i)[0], _turns(i + 1)[1]]
    },
    ("dpo", "unpaired"): lambda i: {
        "prompt": _asked(i), "completion": _said(i), "label": i % 2 > 0
    },
    ("reward", "preference"): lambda i: {
        "prompt": _asked(i), "answers": [_said(i), _said(i + 1), _said(i + 2)]
    },
    ("grpo", "problems"): lambda i: {"prompt": _asked(i), "answer": i + i % 7, "level": i % 3},
    ("grpo", "with steps"): lambda i: {
        "prompt": _turns(i)[:1], "answer": f"It is {i} and {i % 7}.\n#### {i + i % 7}"
    },
}  # fmt: skip


def data_file(stage: str, form: str, folder: Path, rows: int = 48, suffix: str = "jsonl") -> Path:
    """Little data; ``suffix``: jsonl, json or parquet."""
    made = [ROWS[stage, form](i) for i in range(rows)]
    file = folder / f"{stage}-{form}.{suffix}"
    if suffix == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(made), file)
    elif suffix == "json":
        file.write_text(json.dumps(made), encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return file


def pairwise(*factors: list[Any]) -> Iterator[tuple[Any, ...]]:
    """Few choices of one value of each factor in which every two values meet, greedily."""
    places = [(i, j) for i in range(len(factors)) for j in range(i)]
    missing = {(i, a, j, b) for i, j in places for a in factors[i] for b in factors[j]}
    while missing:
        i, a, j, b = min(missing, key=repr)
        case: list[Any] = [None] * len(factors)
        case[i], case[j] = a, b
        known = {i, j}
        for k in set(range(len(factors))) - known:
            case[k] = max(
                factors[k],
                key=lambda v: sum(
                    (max(k, m), *((v, m, case[m]) if k > m else (case[m], k, v))) in missing
                    for m in known
                ),
            )
            known.add(k)
        missing -= {(i, case[i], j, case[j]) for i, j in places}
        yield tuple(case)

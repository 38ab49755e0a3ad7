"""Online learning lifts the quickstart's fine-tuned model on what users correct, and poison fails.

Users ask it to count letters in longer lists than it was fine-tuned on, rate the right answers and
correct the others.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import shardwise
from shardwise.data.stdlib import read_stdlib
from shardwise.rollout.config import Sampling
from shardwise.serve import versions
from shardwise.serve.learn import Training
from tests.serve.trained import write_log


def lists(count: int) -> list[tuple[str, str]]:
    """Problems of 8 to 12 letters with their answers."""
    rng = random.Random(7)
    found: dict[str, str] = {}
    while len(found) < count:
        letters = [
            rng.choice("abcdefgh") if rng.random() < 0.65 else "a"
            for _ in range(rng.randint(8, 12))
        ]
        found["Count the letter a: " + " ".join(letters)] = str(letters.count("a"))
    return list(found.items())


def rated(ckpt: Path, count: int) -> list[dict[str, Any]]:
    """What five users say of the model's answers."""
    asked = lists(count)
    prompts = [[{"role": "user", "content": prompt}] for prompt, _ in asked]
    sampling = Sampling(greedy=True, max_new_tokens=6)
    rows = []
    for i, ([answer], (prompt, right)) in enumerate(
        zip(shardwise.generate(ckpt, prompts, sampling=sampling), asked, strict=True)
    ):
        ok = answer.text.strip() == right
        verdict: dict[str, Any] = {"rating": 1} if ok else {"correction": right}
        rows.append({"prompt": prompt, "answer": answer.text, "client": f"c{i % 5}", **verdict})
    return rows


@pytest.mark.slow
def test_online_learning_lifts_and_forgets_nothing(quickstart: Path, tmp_path: Path) -> None:
    ckpt = quickstart / "stages" / "sft" / "checkpoints"
    texts = sorted(read_stdlib("validation"), key=lambda d: len(d.raw))
    probe = []
    for i, text in enumerate([t for t in texts if 6000 < len(t.raw) < 16000][:3]):
        probe.append(tmp_path / f"{i}.txt")
        probe[-1].write_bytes(text.raw)
    rows = rated(ckpt, 400)
    log = write_log(tmp_path / "log", rows)
    for seed in (0, 1, 2):
        training = Training(epochs=3.0, batch=16, rank=8, seed=seed)
        out = tmp_path / f"out{seed}"
        done = shardwise.learn(log, ckpt, out, training=training, probe_texts=probe)
        before, after = done["fed_back"]["before"], done["fed_back"]["after"]
        print(f"\nseed {seed}: {before} -> {after}, forgetting {done['forgetting']}")
        assert done["accepted"] and versions.current(out) == done["version"]
        assert after["accuracy"] >= before["accuracy"] + 0.1
        assert max(done["forgetting"].values()) < 0.01
    # Many clients agree on a wrong answer, and nobody is against it.
    poison = [
        {"prompt": r["prompt"], "answer": r["answer"], "correction": "9", "client": f"evil{i}"}
        for i, r in enumerate(rows)
    ]
    evil = write_log(tmp_path / "evil", poison)
    done = shardwise.learn(evil, ckpt, out, training=training, probe_texts=probe)
    assert not done["accepted"] and versions.current(out) == done["parent"]
    assert any(reason.startswith("forgetting: accuracy") for reason in done["reasons"])

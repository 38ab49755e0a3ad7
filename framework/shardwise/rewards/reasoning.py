"""reasoning-gym as an optional source of problems (``pip install 'shardwise[tasks]'``).

Its items are seeded by ``seed + index``, so neighbouring seeds share almost all of their items:
ours are spread `SEED_STRIDE` apart. Its scoring functions may parse model text with sympy (which
evaluates it), so they run only in the sandbox: see `score`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.errors import ConfigError
from shardwise.rewards.families import Problem

SEED_STRIDE = 1_000_003
_SIZE = 1_000_000  # virtual: reasoning-gym makes items on demand


def open_source(name: str, options: Mapping[str, Any], seed: int) -> Any:
    """The reasoning-gym dataset ``name``; `ConfigError` names what is missing or unknown."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as e:
        raise ConfigError(
            "task.kind: reasoning_gym needs the package: pip install 'shardwise[tasks]'"
        ) from e
    if name not in DATASETS:
        import difflib

        near = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"task.name: reasoning-gym has no dataset {name!r}{hint}")
    try:
        return reasoning_gym.create_dataset(
            name, size=_SIZE, seed=SEED_STRIDE * (seed + 1) % 2**31, **options
        )
    except (TypeError, ValueError, AssertionError) as e:
        raise ConfigError(f"task.options: reasoning-gym's {name!r} refuses {options}: {e}") from e


def problem(source: Any, name: str, options: Mapping[str, Any], seed: int, index: int) -> Problem:
    """Item ``index``; ``meta`` holds what `score` needs to make the same item again."""
    item = source[index]
    return Problem(
        id=f"{name}-{seed}-{index}",
        question=str(item["question"]),
        answer=str(item["answer"]),
        meta={"name": name, "options": dict(options), "seed": seed, "index": index},
    )


_open: dict[str, Any] = {}


def score(question: str, completion: str, answer: str, meta: Mapping[str, Any]) -> float:
    """A user reward (see `user.py`) that asks the dataset itself; runs in the sandbox only."""
    key = repr((meta["name"], meta["options"], meta["seed"]))
    if key not in _open:
        _open[key] = open_source(meta["name"], meta["options"], meta["seed"])
    source = _open[key]
    return float(source.score_answer(completion.strip(), source[meta["index"]]))

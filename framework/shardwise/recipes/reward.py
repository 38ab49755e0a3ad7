"""What `--reward` names: a verifier by its kind, or a function of the user's own."""

from __future__ import annotations

import itertools
from typing import Any, get_args

from pydantic import ValidationError

from shardwise.errors import UserError
from shardwise.rewards import FileTaskConfig
from shardwise.rewards.scoring import PartConfig, RewardConfig
from shardwise.rewards.verifiers import numeric_match

USUAL = "answer"
SAMPLED = 64  # problems whose answers are looked at
_KINDS = {part.model_fields["kind"].default: part for part in get_args(get_args(PartConfig)[0])}


def known() -> list[str]:
    """Verifiers that need no key but their name."""
    return [name for name, part in _KINDS.items() if not _asks(part)]


def _asks(part: Any) -> bool:
    return any(field.is_required() for field in part.model_fields.values())


def parts(name: str | None) -> list[dict[str, Any]]:
    """A reward's parts. Raises UserError for what is neither a verifier nor ``path.py:name``."""
    name = name or USUAL
    if ":" in name:
        found = {"kind": "user", "function": name}
    elif name in known():
        found = {"kind": name}
    else:
        raise UserError(
            f"--reward {name}: known: {', '.join(known())}, or path.py:name for a function of "
            "your own"
        )
    try:
        RewardConfig.model_validate({"parts": [found]})
    except ValidationError as error:
        raise UserError(f"--reward {name}: {error.errors()[0]['msg']}") from None
    return [found]


def why(name: str | None) -> str:
    """What the verifier gives, in its own words."""
    part = _KINDS["user" if ":" in (name or "") else name or USUAL]
    return (part.__doc__ or "").split("\n")[0].rstrip(".")


def check(name: str | None, task: FileTaskConfig) -> None:
    """Raise UserError where the answers are such as the verifier cannot read."""
    if name != "numeric":
        return
    for problem in itertools.islice(task.problems("train_rl"), SAMPLED):
        if numeric_match(problem.answer, problem.answer) is None:
            raise UserError(
                f"--reward numeric: the answer {problem.answer[:60]!r} is no number (to "
                f"{problem.question[:60]!r}); --reward answer reads texts, too"
            )

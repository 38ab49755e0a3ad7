"""What the benchmarks of reinforcement learning share: a tokenizer, a replayed rollout, prompts."""

from __future__ import annotations

from typing import Any

from shardwise.data.chat import encode_chat
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.rewards import Problem, prompt_messages
from shardwise.stages.play import Group


class EndlessTokenizer(ByteTokenizer):
    """Bytes and a bare template; nothing ends a completion."""

    stop_ids = (-1,)

    def __init__(self) -> None:
        super().__init__("{% for m in messages %}{{ m['content'] }}{% endfor %}\n")


class Replay:
    """Stands in for the stage's player: hands out stored groups."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def sync(self, engine: object) -> None:
        """Nothing is generated, so no weights are needed."""

    def play(self, problems: list[Problem], *_: Any, **__: Any) -> list[Group]:
        """The stored groups of these problems."""
        return [next(g for g in self.groups if g.problem == p) for p in problems]


def text_of(stage: Any, problem: Problem) -> str:
    """The prompt as text, control tokens spelt out."""
    tokenizer = stage.ctx.tokenizer
    messages = prompt_messages(problem, stage.config.task)
    ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    return tokenizer.decode(ids, skip_special=False)

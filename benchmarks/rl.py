"""What the benchmarks of reinforcement learning share: prompts, a replayed rollout, the race."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from common import clock, table, use_threads, verdict
from contest import Contest, Lap

from shardwise.data.chat import encode_chat
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.metrics.timing import Laps, load
from shardwise.rewards import Problem, prompt_messages
from shardwise.stages.groups import Group


class EndlessTokenizer(ByteTokenizer):
    """Bytes and a bare template; nothing ends a completion."""

    stop_ids = (-1,)

    def __init__(self) -> None:
        super().__init__("{% for m in messages %}{{ m['content'] }}{% endfor %}\n")


class Replay:
    """Stands in for the stage's rollout worker: hands out stored groups."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def sync(self, engine: object) -> None:
        """Nothing is generated, so no weights are needed."""

    def rollout(self, problems: list[Problem], *_: Any, **__: Any) -> list[Group]:
        """The stored groups of these problems."""
        return [next(g for g in self.groups if g.problem == p) for p in problems]


def text_of(stage: Any, problem: Problem) -> str:
    """The prompt as text, control tokens spelt out."""
    tokenizer = stage.ctx.tokenizer
    messages = prompt_messages(problem, stage.config.task)
    ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    return tokenizer.decode(ids, skip_special=False)


OURS = "shardwise"
TOLERANCE = 1e-4


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options that both benchmarks have; the clock is set."""
    parser.add_argument("--turns", type=int, default=12, help="counted turns of each")
    parser.add_argument("--warmup", type=int, default=3, help="turns that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--tiny", action="store_true", help="a toy model, 8 tokens: a self-check")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")
    options = parser.parse_args(argv)
    use_threads(options.threads)
    clock.kind = options.clock
    options.load = load()
    return options


def take_turns(train_step: Callable[[int], object], lap: Lap) -> None:
    """Our side of the race: a step a turn."""
    lap.start()
    for step in itertools.count():
        train_step(step)
        if not lap():
            return


def exchange(contest: Contest, peer: str) -> tuple[dict[str, Any], Any, Any, Any]:
    """What the peer was built from, the stored rollout, and what both sides made of it.

    Ours sends the first three; the peer takes the first two and sends the last.
    """
    arguments, stored, ours = contest.pipes[OURS].recv()
    contest.pipes[peer].send((arguments, stored))
    return arguments, stored, ours, contest.pipes[peer].recv()


def accept(differences: Mapping[str, float]) -> None:
    """Print how far the two sides differ; SystemExit if it is too far."""
    for name, value in differences.items():
        print(f"replay: {name} differ by {value:.1e} at most")
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"the two trainers disagree by more than {TOLERANCE}: nothing was timed")


def conclude(
    title: str,
    laps: Laps,
    peer: str,
    target: float,
    differences: Mapping[str, float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Print the table of the race; returns what was printed, as data."""
    print(
        f"\n{title}, {options.threads} threads, {options.clock} clock, "
        f"load {options.load} before and {load()} after"
    )
    ratio = laps.ratio(OURS, peer)
    rows = [[n, f"{laps.median(n):.3f}", f"{laps.ratio(n, peer):.2f}"] for n in (OURS, peer)]
    print(table(["", "s/step", f"times {peer}"], rows))
    print(f"against {peer}: {verdict(ratio, target)}")
    seconds = {n: laps.median(n) for n in (OURS, peer)}
    result = {"replay": differences, "seconds": seconds, "ratio": ratio}
    if options.json:
        print(json.dumps(result))
    return result

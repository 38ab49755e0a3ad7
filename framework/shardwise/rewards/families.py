"""Built-in task families: pure functions ``(config, seed, index) -> Problem``.

Nothing here knows about splits; see `tasks.ProblemSet`. Each problem carries its own chain of
thought in ``meta["steps"]``, so that a stage may fine-tune with or without one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import xxhash


class Problem(NamedTuple):
    """A question with a verifiable answer. ``meta`` is plain JSON.

    ``messages``: the prompt where it is more than the question as a user's message. ``others``:
    further answers that are as right.
    """

    id: str
    question: str
    answer: str
    meta: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]] | None = None
    others: tuple[str, ...] = ()


class LettersConfig(Protocol):
    """What `count_letters` reads of its config."""

    @property
    def min_length(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def letters(self) -> str: ...
    @property
    def targets(self) -> str: ...


class SumsConfig(Protocol):
    """What `arithmetic` reads of its config."""

    @property
    def operations(self) -> tuple[Operation, ...]: ...
    @property
    def min_digits(self) -> int: ...
    @property
    def max_digits(self) -> int: ...
    @property
    def chain_length(self) -> int: ...


Operation = Literal["add", "subtract", "multiply", "compare", "chain"]


def seeded(kind: str, seed: int, index: int) -> random.Random:
    """The draws of one problem of a family."""
    return random.Random(xxhash.xxh3_128_intdigest(f"{kind}/{seed}/{index}".encode()))


def count_letters(config: LettersConfig, seed: int, index: int) -> Problem:
    """``Count the letter a: b a c a`` -> ``2``; letters and length uniform."""
    rng = seeded("count_letters", seed, index)
    target = rng.choice(config.targets or config.letters)
    text = rng.choices(config.letters, k=rng.randint(config.min_length, config.max_length))
    count, steps = 0, []
    for letter in text:
        count += letter == target
        steps.append(f"{letter} {count}")
    return Problem(
        id=f"count_letters-{seed}-{index}",
        question=f"Count the letter {target}: {' '.join(text)}",
        answer=str(count),
        meta={"length": len(text), "steps": ", ".join(steps)},
    )


def arithmetic(config: SumsConfig, seed: int, index: int) -> Problem:
    """One of ``config.operations`` on numbers of ``min_digits`` to ``max_digits`` digits."""
    rng = seeded("arithmetic", seed, index)
    operation = rng.choice(config.operations)

    def number() -> int:
        digits = rng.randint(config.min_digits, config.max_digits)
        return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)

    question, answer, steps = _OPERATIONS[operation](rng, number, config.chain_length)
    return Problem(
        id=f"arithmetic-{seed}-{index}",
        question=question,
        answer=answer,
        meta={"operation": operation, "steps": steps},
    )


Parts = tuple[str, str, str]  # question, answer, steps


def _add(rng: random.Random, number: Callable[[], int], chain: int) -> Parts:
    a, b = number(), number()
    return f"What is {a} + {b}?", str(a + b), _by_place(a, b)


def _by_place(a: int, b: int) -> str:
    """Addition by decimal place, the smallest first."""
    steps, place = [], 1
    while place <= max(a, b, 1):
        x, y = a // place % 10 * place, b // place % 10 * place
        steps.append(f"{x} + {y} = {x + y}")
        place *= 10
    return ", ".join(steps)


def _subtract(rng: random.Random, number: Callable[[], int], chain: int) -> Parts:
    a, b = number(), number()
    return f"What is {a} - {b}?", str(a - b), f"{a} - {b} = {a - b}"


def _multiply(rng: random.Random, number: Callable[[], int], chain: int) -> Parts:
    a, b = number(), number()
    tens, ones = b // 10 * 10, b % 10
    steps = f"{a} * {tens} = {a * tens}, {a} * {ones} = {a * ones}"
    return f"What is {a} * {b}?", str(a * b), steps


def _compare(rng: random.Random, number: Callable[[], int], chain: int) -> Parts:
    a = b = number()
    while a == b:
        b = number()
    sign = ">" if a > b else "<"
    return f"Which is larger, {a} or {b}?", str(max(a, b)), f"{a} {sign} {b}"


def _chain(rng: random.Random, number: Callable[[], int], chain: int) -> Parts:
    total = number()
    expression, steps = str(total), []
    for _ in range(chain):
        sign, b = rng.choice("+-"), number()
        result = total + b if sign == "+" else total - b
        steps.append(f"{total} {sign} {b} = {result}")
        expression += f" {sign} {b}"
        total = result
    return f"What is {expression}?", str(total), ", ".join(steps)


_OPERATIONS: dict[str, Callable[[random.Random, Callable[[], int], int], Parts]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "compare": _compare,
    "chain": _chain,
}

"""The numbers game: an expression that uses each of the given numbers once and has a given value.

Many answers are right, and each is judged from the question alone: the usual test of search and of
reinforcement from nothing (Yao et al. 2023, "Tree of Thoughts", section 4.1; Gandhi et al. 2024,
"Stream of Search", section 3).
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, Protocol

from shardwise.errors import ConfigError
from shardwise.rewards.families import Problem, seeded

Operator = Literal["+", "-", "*", "/"]
_VALUE: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}
_SPELLED = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "[": "(", "]": ")"})  # noqa: RUF001
_TOKEN = re.compile(r"\s*(?:(\d+)|(.))", re.DOTALL)
_PATIENCE = 10_000  # draws in a row that make no problem


class GameConfig(Protocol):
    """What `countdown` reads of its config."""

    @property
    def min_numbers(self) -> int: ...
    @property
    def max_numbers(self) -> int: ...
    @property
    def max_number(self) -> int: ...
    @property
    def max_target(self) -> int: ...
    @property
    def operators(self) -> tuple[Operator, ...]: ...


def countdown(config: GameConfig, seed: int, index: int) -> Problem:
    """``Make 24 from 3, 5, 8`` -> ``(8 - 5) * 8``; its steps go from number to number.

    No step is negative or broken. Raises ConfigError where draw after draw has no fitting value.
    """
    rng = seeded("countdown", seed, index)
    for _ in range(_PATIENCE):
        count = rng.randint(config.min_numbers, config.max_numbers)
        numbers = [rng.randint(1, config.max_number) for _ in range(count)]
        if (made := _chain(config, rng, numbers)) is not None:
            target, expression, steps = made
            shown = sorted(numbers)
            return Problem(
                id=f"countdown-{seed}-{index}",
                question=f"Make {target} from {', '.join(map(str, shown))}",
                answer=expression,
                meta={"numbers": shown, "target": target, "steps": ", ".join(steps)},
            )
    raise ConfigError(
        "task countdown: numbers up to max_number have hardly ever a value of at most "
        f"max_target {config.max_target} with these operators; raise max_target"
    )


def _chain(
    config: GameConfig, rng: random.Random, numbers: Sequence[int]
) -> tuple[int, str, list[str]] | None:
    """(value, expression, steps) of random operations on the numbers in order, if they fit."""
    total, expression, binds, steps = numbers[0], str(numbers[0]), 3, []
    for number in numbers[1:]:
        sign = rng.choice(config.operators)
        result = _VALUE[sign](Fraction(total), Fraction(number))
        if result < 0 or result.denominator != 1 or result > config.max_target:
            return None
        steps.append(f"{total} {sign} {number} = {int(result)}")
        inner = f"({expression})" if binds < _BINDS[sign] else expression
        total, expression, binds = int(result), f"{inner} {sign} {number}", _BINDS[sign]
    return total, expression, steps


def countdown_match(got: str | None, meta: Mapping[str, Any]) -> float | None:
    """1 when an expression has ``meta["target"]`` as its value and uses ``meta["numbers"]`` up.

    Behind a ``=``, the target may stand. None where ``meta`` has no such lists of integers.
    """
    numbers, target = meta.get("numbers"), meta.get("target")
    if not isinstance(numbers, list) or not all(type(n) is int for n in [target, *numbers]):
        return None
    if got is None:
        return 0.0
    text, equals, right = got.translate(_SPELLED).partition("=")
    if equals and right.strip() != str(target):
        return 0.0
    # Literals are the given numbers before anything is computed, so nothing grows without end.
    tokens = [(number, sign) for number, sign in _TOKEN.findall(text.rstrip())]
    literals = [n.lstrip("0") or "0" for n, _ in tokens if n]
    if sorted(literals) != sorted(map(str, numbers)):
        return 0.0
    return float(_value(tokens) == target)


def apply_operator(sign: str, a: int, b: int) -> Fraction | None:
    """The value of one operation; None for a division by 0."""
    return None if sign == "/" and not b else _VALUE[sign](Fraction(a), Fraction(b))


def _value(tokens: Sequence[tuple[str, str]]) -> Fraction | None:
    """The value of an infix expression (Dijkstra's shunting yard); None for what is none."""
    values: list[Fraction] = []
    signs: list[str] = []

    def apply(down_to: int) -> bool:
        """Operations that bind at least so tightly, back to an open bracket."""
        while signs and signs[-1] != "(" and _BINDS[signs[-1]] >= down_to:
            sign, b, a = signs.pop(), values.pop(), values.pop()
            if sign == "/" and not b:
                return False
            values.append(_VALUE[sign](a, b))
        return True

    operand = True  # whether a number, or an open bracket, comes next
    for number, sign in tokens:
        if operand != bool(number or sign == "("):
            return None
        if number:
            values.append(Fraction(int(number)))
            operand = False
        elif sign == "(":
            signs.append(sign)
        elif sign == ")":
            if not apply(0) or not signs:
                return None
            signs.pop()
        elif sign not in _BINDS or not apply(_BINDS[sign]):
            return None
        else:
            signs.append(sign)
            operand = True
    if operand or not apply(0) or signs:
        return None
    return values[0]

"""The layout grammar: how ranks are arranged, as one short string such as ``dp4.hsdp2.zero3``.

Tokens are joined by dots, in any order, defaults left out: ``dpN`` all data ranks, ``hsdpN`` the
ranks of one shard group (the rest replicate), ``zero0`` to ``zero3`` the ZeRO stage. ``auto`` is
data parallelism over all ranks.
"""

from __future__ import annotations

import dataclasses
import re

from shardwise.errors import ConfigError

_TOKEN = re.compile(r"(dp|hsdp|zero)(\d+)")
KNOWN = "dpN, hsdpN, zero0, zero1, zero2, zero3"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parsed layout. ``dp`` counts all data ranks; ``shard`` of them share one copy of state."""

    dp: int = 1
    shard: int = 1
    zero: int = 1

    @property
    def replicate(self) -> int:
        """Number of shard groups that hold the same state."""
        return self.dp // self.shard

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp

    def __str__(self) -> str:
        hsdp = f".hsdp{self.shard}" if self.zero and self.shard != self.dp else ""
        return f"dp{self.dp}{hsdp}.zero{self.zero}"


def parse_layout(text: str, world_size: int) -> Layout:
    """Parse ``text`` for ``world_size`` ranks.

    Raises:
        ConfigError: an unknown or repeated token, or numbers that do not fit the ranks.
    """
    values: dict[str, int] = {}
    for token in [] if text == "auto" else text.split("."):
        match = _TOKEN.fullmatch(token)
        if not match:
            raise ConfigError(
                f"engine.layout: {token!r} in {text!r} is not a layout token; known: {KNOWN}"
            )
        axis, number = match[1], int(match[2])
        if axis in values:
            raise ConfigError(f"engine.layout: {axis!r} appears twice in {text!r}")
        values[axis] = number
    dp = values.get("dp", world_size if text == "auto" or "dp" not in values else 1)
    zero = values.get("zero", 1)
    shard = values.get("hsdp", dp)
    if zero > 3:
        raise ConfigError(f"engine.layout: zero{zero} in {text!r}; ZeRO stages are 0 to 3")
    if dp < 1 or shard < 1 or dp % shard:
        raise ConfigError(
            f"engine.layout: hsdp{shard} must divide dp{dp} in {text!r}; "
            f"nearest that works: dp{max(dp, 1)}.hsdp{_nearest_divisor(dp, shard)}"
        )
    if zero == 0:
        if "hsdp" in values and shard != 1:
            raise ConfigError(f"engine.layout: zero0 shards nothing; drop hsdp{shard} in {text!r}")
        shard = 1
    if dp != world_size:
        raise ConfigError(
            f"engine.layout: {text!r} needs {dp} ranks but {world_size} were started; "
            f"use --nproc {dp} or engine.layout=dp{world_size}.zero{zero}"
        )
    return Layout(dp=dp, shard=shard, zero=zero)


def _nearest_divisor(number: int, wish: int) -> int:
    divisors = [d for d in range(1, max(number, 1) + 1) if max(number, 1) % d == 0]
    return min(divisors, key=lambda d: abs(d - wish))

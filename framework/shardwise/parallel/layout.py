"""The layout grammar: how ranks are arranged, as one short string such as ``dp2.zero1.tp2.sp``.

Tokens are joined by dots, in any order, defaults left out: ``dpN`` all data ranks, ``hsdpN`` the
data ranks of one shard group (the rest replicate), ``zero0`` to ``zero3`` the ZeRO stage, ``tpN``
tensor parallel, ``sp`` sequence parallel within tp, ``ppN`` pipeline stages, ``vN`` virtual stages
a rank, a schedule's name, ``cpN`` context parallel with ``ring`` or ``ulysses``, ``epN`` expert
parallel. ``auto`` is data parallelism over all ranks. What a model and a batch allow is decided
by `parallel.feasible`.
"""

from __future__ import annotations

import dataclasses
import math
import re

from shardwise.errors import ConfigError

_NUMBER = re.compile(r"(dp|hsdp|zero|tp|pp|v|cp|ep)(\d+)")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "interleavedzb", "zbv", "dualpipev")
CP_KINDS = ("ring", "ulysses")
# Schedules with one model chunk a rank, with two in a V, and with `vN` in a loop.
SINGLE, V_SHAPED = ("gpipe", "1f1b"), ("zbv", "dualpipev")
# Schedules that compute gradients of weights apart from those of activations.
SPLIT_BACKWARD = ("interleavedzb", "zbv", "dualpipev")
KNOWN = (
    "dpN, hsdpN, zero0-zero3, tpN, sp, ppN, vN, "
    "gpipe|1f1b|interleaved|interleavedzb|zbv|dualpipev, cpN, ring|ulysses, epN"
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parsed layout. ``dp`` counts all data ranks; ``shard`` of them share one copy of state."""

    dp: int = 1
    shard: int = 1
    zero: int = 1
    tp: int = 1
    sp: bool = False
    pp: int = 1
    virtual: int = 1  # model chunks a rank
    schedule: str = "1f1b"
    cp: int = 1
    cp_kind: str = "ring"
    ep: int = 1

    @property
    def replicate(self) -> int:
        """Number of shard groups that hold the same state."""
        return self.dp // self.shard

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def num_chunks(self) -> int:
        """Pipeline stages, virtual ones counted."""
        return self.pp * self.virtual

    def __str__(self) -> str:
        parts = [f"dp{self.dp}"] if self.dp > 1 else []
        if self.zero and self.shard != self.dp:
            parts.append(f"hsdp{self.shard}")
        if self.dp > 1 or self.zero != 1:
            parts.append(f"zero{self.zero}")
        if self.tp > 1:
            parts += [f"tp{self.tp}"] + ["sp"] * self.sp
        if self.pp > 1:
            parts.append(f"pp{self.pp}")
            parts += [f"v{self.virtual}"] * (self.schedule in ("interleaved", "interleavedzb"))
            parts.append(self.schedule)
        if self.cp > 1:
            parts += [f"cp{self.cp}", self.cp_kind]
        if self.ep > 1:
            parts.append(f"ep{self.ep}")
        return ".".join(parts) or "dp1"


def world_of(text: str, ranks: int = 1) -> int:
    """Ranks that a layout's numbers ask for; without ``dpN`` it takes what fits of ``ranks``."""
    found = dict(re.findall(r"(?:^|\.)(dp|tp|pp|cp)(\d+)", text))
    model_ranks = math.prod(int(found.get(axis, 1)) for axis in ("tp", "pp", "cp"))
    return model_ranks * int(found.get("dp", max(1, ranks // max(1, model_ranks))))


def parse_layout(text: str, world_size: int) -> Layout:
    """Parse ``text`` for ``world_size`` ranks.

    Raises:
        ConfigError: an unknown or repeated token, or numbers that do not fit the ranks.
    """
    numbers, words = _tokens(text)
    tp, pp, cp, ep = (numbers.get(axis, 1) for axis in ("tp", "pp", "cp", "ep"))
    model_ranks = tp * pp * cp
    dp = numbers.get("dp", max(1, world_size // model_ranks) if model_ranks else 1)
    zero = numbers.get("zero", 1)
    shard = numbers.get("hsdp", dp)
    for axis in ("dp", "tp", "pp", "cp", "ep", "v", "hsdp"):
        if numbers.get(axis, 1) < 1:
            raise ConfigError(f"engine.layout: {axis}0 in {text!r}; at least {axis}1")
    if zero > 3:
        raise ConfigError(f"engine.layout: zero{zero} in {text!r}; ZeRO stages are 0 to 3")
    if dp % shard:
        raise ConfigError(
            f"engine.layout: hsdp{shard} must divide dp{dp} in {text!r}; "
            f"nearest that does: hsdp{nearest_divisor(dp, shard)}"
        )
    if zero == 0:
        if numbers.get("hsdp", 1) != 1:
            raise ConfigError(f"engine.layout: zero0 shards nothing; drop hsdp{shard} in {text!r}")
        shard = 1
    if dp * model_ranks != world_size:
        raise ConfigError(_wrong_world(text, dp, model_ranks, world_size))
    if ep != 1:
        raise ConfigError(f"engine.layout: ep{ep} in {text!r}: no model has experts yet; drop it")
    sp = words.get("sp") is not None
    if sp and tp == 1:
        raise ConfigError(f"engine.layout: sp in {text!r} needs tpN with N > 1; drop sp or add tp2")
    cp_kind = words.get("cp")
    if cp_kind and cp == 1:
        raise ConfigError(f"engine.layout: {cp_kind} in {text!r} needs cpN with N > 1")
    schedule, virtual = _schedule(text, pp, words.get("pp"), numbers.get("v"))
    return Layout(
        dp, shard, zero, tp, sp, pp, virtual, schedule, cp, cp_kind or "ring", ep
    )  # fmt: skip


def _tokens(text: str) -> tuple[dict[str, int], dict[str, str]]:
    numbers: dict[str, int] = {}
    words: dict[str, str] = {}
    for token in [] if text == "auto" else text.split("."):
        match = _NUMBER.fullmatch(token)
        where = "sp" if token == "sp" else "pp" if token in SCHEDULES else "cp"
        if not match and token not in ("sp", *SCHEDULES, *CP_KINDS):
            raise ConfigError(
                f"engine.layout: {token!r} in {text!r} is not a layout token; known: {KNOWN}"
            )
        axis = match[1] if match else where
        if axis in (numbers if match else words):
            named = {"pp": "a schedule", "cp": "ring or ulysses"}
            what = axis if match else named.get(axis, axis)
            raise ConfigError(f"engine.layout: {what} appears twice in {text!r}")
        if match:
            numbers[axis] = int(match[2])
        else:
            words[axis] = token
    return numbers, words


def _schedule(text: str, pp: int, name: str | None, v: int | None) -> tuple[str, int]:
    """The schedule and the model chunks a rank that it implies."""
    if pp == 1:
        if name or (v or 1) > 1:
            raise ConfigError(
                f"engine.layout: {name or f'v{v}'} in {text!r} needs ppN with N > 1; "
                "drop it, or add pp2"
            )
        return "1f1b", 1
    schedule = name or ("interleaved" if (v or 1) > 1 else "1f1b")
    if schedule in SINGLE and (v or 1) > 1:
        raise ConfigError(
            f"engine.layout: {schedule} runs one model chunk a rank, not v{v}, in {text!r}; "
            "write interleaved, or drop v"
        )
    if schedule in V_SHAPED and (v or 2) != 2:
        raise ConfigError(
            f"engine.layout: {schedule} runs two model chunks a rank, not v{v}, in {text!r}; drop v"
        )
    if schedule in ("interleaved", "interleavedzb") and v == 1:
        raise ConfigError(
            f"engine.layout: {schedule} needs v2 or more in {text!r}; use 1f1b, or v2"
        )
    return schedule, 1 if schedule in SINGLE else (v or 2)


def _wrong_world(text: str, dp: int, model_ranks: int, world: int) -> str:
    needed = dp * model_ranks
    return (
        f"engine.layout: {text!r} needs {needed} ranks but {world} were started; "
        f"use --nproc {needed}"
    )


def nearest_divisor(number: int, wish: int) -> int:
    """The divisor of ``number`` that is closest to ``wish``."""
    divisors = [d for d in range(1, max(number, 1) + 1) if max(number, 1) % d == 0]
    return min(divisors, key=lambda d: abs(d - wish))

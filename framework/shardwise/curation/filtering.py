"""From rows to those that are kept, and what is told of the others."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shardwise.curation import set_rules
from shardwise.curation.config import FilterRules, Rule
from shardwise.curation.held_out import HeldOut
from shardwise.curation.row_rules import CountTokens, RowRules
from shardwise.curation.rows import Row
from shardwise.errors import DataError

# In which order rules are applied, whatever a recipe lists first (see the room's front page).
ROW_KINDS = ("format", "length", "language", "verifier", "threshold")
SET_KINDS = ("duplicates", "diversity", "quota")
CONTAMINATION = "contamination"
_SHOWN = 3  # examples of what a rule dropped
_EXCERPT = 160  # characters of an example's texts


@dataclass(frozen=True)
class Verdict:
    """A row, and which rule drops it for what reason; ``rule`` is empty while it stays."""

    row: Row
    rule: str = ""
    why: str = ""


@dataclass(frozen=True)
class Filtered:
    """Verdicts on all rows, in the order in which they came, and the report on them."""

    verdicts: Sequence[Verdict]
    report: dict[str, Any]

    @property
    def kept(self) -> list[Row]:
        """The rows that met every rule."""
        return [v.row for v in self.verdicts if not v.rule]


def filter_rows(
    rows: Iterable[Row],
    config: FilterRules,
    held_out: HeldOut | None = None,
    count_tokens: CountTokens | None = None,
    seed: int = 0,
) -> Filtered:
    """`judge_rows`, then `judge_set`; see there."""
    with RowRules(config, count_tokens) as rules:
        verdicts = judge_rows(list(rows), rules, held_out or HeldOut(config.contamination))
    return judge_set(verdicts, config, seed)


def judge_rows(rows: Sequence[Row], rules: RowRules, held_out: HeldOut) -> list[Verdict]:
    """What each row comes to by itself, whatever the others are: rows may be judged in parts."""
    found = [Verdict(row) for row in rows]
    for name, rule in named(rules.config, ROW_KINDS):
        left = [i for i, v in enumerate(found) if not v.rule]
        judged = rules.judge(rule, [found[i].row for i in left])  # type: ignore[arg-type]
        for i, (row, why) in zip(left, judged, strict=True):
            found[i] = Verdict(row, name if why else "", why)
    for i, verdict in enumerate(found):
        if not verdict.rule and (why := held_out.overlap(verdict.row)):
            found[i] = Verdict(verdict.row, CONTAMINATION, why)
    return found


def judge_set(verdicts: Sequence[Verdict], config: FilterRules, seed: int = 0) -> Filtered:
    """The rules of the set on what `judge_rows` left; ``seed``: of ties.

    Raises DataError where a row overlaps a held-out set and the config does not drop it, and where
    no row is left; the message says which rules did it.
    """
    found = list(verdicts)
    if config.contamination.on_overlap == "error":
        refuse_overlap(found)
    order = [i for i, v in enumerate(found) if not v.rule]
    order.sort(key=lambda i: found[i].row.rank(config.score_field, seed))
    for name, rule in named(config, SET_KINDS):
        gone = set_rules.drop(rule, [found[i].row for i in order])  # type: ignore[arg-type]
        for number, why in gone.items():
            found[order[number]] = Verdict(found[order[number]].row, name, why)
        order = [i for n, i in enumerate(order) if n not in gone]
    filtered = Filtered(found, report_of(found, config))
    if not order:
        raise DataError(_nothing_left(filtered.report, config))
    return filtered


def named(config: FilterRules, kinds: Sequence[str]) -> list[tuple[str, Rule]]:
    """The rules of some kinds in the order of these, by a name that no other rule has."""
    found = []
    for kind in kinds:
        rules = [rule for rule in config.rules if rule.kind == kind]
        alone = len(rules) == 1
        found += [(kind if alone else f"{kind} {n}", rule) for n, rule in enumerate(rules, start=1)]
    return found


def refuse_overlap(verdicts: Sequence[Verdict]) -> None:
    """Raise DataError that says how many rows overlap held-out sets, and which come first."""
    bad = [v for v in verdicts if v.rule == CONTAMINATION]
    if bad:
        first = "; ".join(f"{v.row.where}: {v.why}" for v in bad[:_SHOWN])
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DataError(
            f"{len(bad)} of {len(verdicts)} rows overlap what is held out for measuring "
            f"({first}{more}): training on them would make the measurements worthless. Take other "
            "prompts, or write contamination.on_overlap: drop to leave such rows out"
        )


def report_of(verdicts: Sequence[Verdict], config: FilterRules) -> dict[str, Any]:
    """How many rows went in, what each rule dropped and why, and what is left, as plain JSON.

    ``rows_of_a_prompt``: how many prompts have so many rows that are kept.
    """
    kept = [v.row for v in verdicts if not v.rule]
    left = len(verdicts)
    rules = []
    names = [name for name, _ in named(config, ROW_KINDS)]
    names += [CONTAMINATION, *(name for name, _ in named(config, SET_KINDS))]
    for name in names:
        dropped = [v for v in verdicts if v.rule == name]
        examples = [_example(v) for v in dropped[:_SHOWN]]
        rules.append({"rule": name, "seen": left, "dropped": len(dropped), "examples": examples})
        left -= len(dropped)
    prompts = Counter(row.prompt_key for row in kept)
    sizes = Counter(prompts.values())
    return {
        "rows": len(verdicts),
        "kept": len(kept),
        "rules": rules,
        "prompts": len({v.row.prompt_key for v in verdicts}),
        "prompts_kept": len(prompts),
        "rows_of_a_prompt": {str(size): sizes[size] for size in sorted(sizes)},
        "mean_score": _mean([v.row for v in verdicts], config.score_field),
        "mean_score_kept": _mean(kept, config.score_field),
    }


def _example(verdict: Verdict) -> dict[str, str]:
    row = verdict.row
    texts = {"prompt": row.prompt, "answer": row.answer}
    cut = {k: t if len(t) <= _EXCERPT else f"{t[:_EXCERPT]}..." for k, t in texts.items()}
    return {"where": row.where, "why": verdict.why, **cut}


def _mean(rows: Sequence[Row], field: str) -> float | None:
    scores = [score for row in rows if (score := row.score(field)) is not None]
    return math.fsum(scores) / len(scores) if scores else None


def _nothing_left(report: dict[str, Any], config: FilterRules) -> str:
    """Which rule dropped most, and what to loosen."""
    worst = max(report["rules"], key=lambda r: r["dropped"])
    by_name = {**dict(named(config, (*ROW_KINDS, *SET_KINDS)))}
    loosen = by_name.get(worst["rule"], config.contamination).loosen
    said = ", ".join(f"{r['rule']} {r['dropped']}" for r in report["rules"] if r["dropped"])
    return (
        f"no row is left of {report['rows']}; dropped by {said or 'no rule'}. {worst['rule']} "
        f"dropped most (as {json.dumps(worst['examples'][0]['why'])[1:-1]}): take {loosen}"
        if report["rows"]
        else "there are no rows to filter"
    )


def table(report: dict[str, Any]) -> str:
    """The report as lines for a log."""
    width = max(len(r["rule"]) for r in report["rules"])
    lines = [f"{'rule':<{width}} {'seen':>9} {'dropped':>9}  as"]
    for rule in report["rules"]:
        why = rule["examples"][0]["why"] if rule["examples"] else ""
        lines.append(f"{rule['rule']:<{width}} {rule['seen']:>9,} {rule['dropped']:>9,}  {why}")
    lines.append(
        f"{report['kept']:,} of {report['rows']:,} rows kept, of {report['prompts_kept']:,} of "
        f"{report['prompts']:,} prompts"
    )
    return "\n".join(line.rstrip() for line in lines)

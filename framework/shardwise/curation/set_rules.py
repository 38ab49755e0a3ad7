"""Rules of the set: what a row's neighbours say. All get rows from the best to the worst.

Each returns why a row goes, by its number; what is not named stays. What a rule keeps, it would
keep again, and any part of it too.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence

from shardwise.curation.config import DiversityRule, DuplicatesRule, QuotaRule, SetRule
from shardwise.curation.near import NearIndex, Parts
from shardwise.curation.rows import Row, read_source
from shardwise.curation.words import distance, jaccard, normal, shingles, tokens


def drop(rule: SetRule, rows: Sequence[Row]) -> dict[int, str]:
    """Why a rule drops rows, by their number in ``rows``, which stand best first."""
    match rule:
        case DuplicatesRule():
            return duplicates(rows, rule)
        case DiversityRule():
            return too_alike(rows, rule)
        case QuotaRule():
            return over_quota(rows, rule)


def duplicates(rows: Sequence[Row], rule: DuplicatesRule) -> dict[int, str]:
    """Rows that a row of ``against`` or a better one says, in equal words or nearly so.

    Preferences are equal if all of their answers are, in order.
    """
    keys = [tuple(map(normal, row.texts(rule.by))) for row in rows]
    parts = [_parts(row, rule) for row in rows] if rule.near is not None else []
    rarity = Counter(s for found in parts for s in frozenset().union(*found))
    gone = _known(keys, parts, rarity, rule) if rule.against else {}
    kept = NearIndex(rarity, rule.near or 1.0)
    first: dict[tuple[str, ...], int] = {}
    for i, key in enumerate(keys):
        if i in gone:
            continue
        if (same := first.get(key)) is not None:
            gone[i] = f"says what {rows[same].where} says"
            continue
        if rule.near is not None:
            if (near := next(kept.near(parts[i]), None)) is not None:
                gone[i] = f"says nearly what {rows[near].where} says"
                continue
            kept.add(i, parts[i])
        first[key] = i
    return gone


def _known(
    keys: Sequence[tuple[str, ...]],
    parts: Sequence[Parts],
    rarity: Counter[int],
    rule: DuplicatesRule,
) -> dict[int, str]:
    """Rows that another set has: it is read past an index of ours, and not kept."""
    gone: dict[int, str] = {}
    same: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        same[key].append(i)
    index = NearIndex(rarity, rule.near or 1.0)
    for i, found in enumerate(parts):
        index.add(i, found)
    for other in (row for source in rule.against for row in read_source(source)):
        for i in same.get(tuple(map(normal, other.texts(rule.by))), ()):
            gone.setdefault(i, f"stands in {other.where}")
        for i in index.near(_parts(other, rule)) if parts else ():
            gone.setdefault(i, f"nearly stands in {other.where}")
    return gone


def _parts(row: Row, rule: DuplicatesRule) -> Parts:
    """Shingles of the prompt and of the answers, those of each answer apart."""
    texts = {"prompt": [row.prompt], "answer": row.answers}
    return tuple(
        frozenset().union(
            *(shingles(tokens(t), rule.shingle, f"{of}{i}") for i, t in enumerate(texts[of]))
        )
        for of in texts
        if rule.by in (of, "row")
    )


def too_alike(rows: Sequence[Row], rule: DiversityRule) -> dict[int, str]:
    """Rows whose answer is nearer than ``min_distance`` to a better one's of the same prompt."""
    gone: dict[int, str] = {}
    kept: dict[str, list[tuple[Row, list[str], frozenset[int]]]] = defaultdict(list)
    for i, row in enumerate(rows):
        said = tokens("\n".join(row.answers))
        pieces = shingles(said, rule.shingle) if rule.measure == "jaccard" else frozenset()
        for other, its_tokens, its_pieces in kept[row.prompt_key]:
            edit = rule.measure == "edit"
            apart = distance(said, its_tokens) if edit else 1.0 - jaccard(pieces, its_pieces)
            if apart < rule.min_distance:
                gone[i] = f"{apart:.2f} from {other.where}, at least {rule.min_distance:g} allowed"
                break
        else:
            kept[row.prompt_key].append((row, said, pieces))
    return gone


def over_quota(rows: Sequence[Row], rule: QuotaRule) -> dict[int, str]:
    """All but the best of each prompt, and of these all but the best."""
    gone: dict[int, str] = {}
    taken: Counter[str] = Counter()
    for i, row in enumerate(rows):
        key = quota_key(row, rule)
        if rule.per_prompt is not None and taken[key] >= rule.per_prompt:
            gone[i] = f"{rule.per_prompt} better ones of its prompt"
        elif rule.total is not None and taken.total() >= rule.total:
            gone[i] = f"{rule.total} better ones"
        else:
            taken[key] += 1
    return gone


def quota_key(row: Row, rule: QuotaRule) -> str:
    """What rows of one prompt share."""
    if rule.field is None:
        return row.prompt_key
    return json.dumps(row.field(rule.field), sort_keys=True, ensure_ascii=False)

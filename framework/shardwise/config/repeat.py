"""``kind: repeat``: stages that are gone through several times (the flywheel).

They are written out before a recipe is checked, so nothing else knows of rounds: stage ``sft`` of
round 2 is the stage ``sft-2``. Inside, a name means the newest stage of that name: of this round if
it stands above, else of the round before. With ``until``, a decision stands behind each round.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from shardwise.config.explain import explain
from shardwise.config.schema import Fraction, JobConfig, PositiveInt, Section
from shardwise.config.source import Path, Problem, Tree

KIND = "repeat"


class StopRule(Section):
    """When rounds are enough: one that adds too little to the best before it."""

    metric: str = Field(
        description="of an evaluation, after the last stage of a round that has it",
        examples=["accuracy"],
    )
    min_gain: Fraction = Field(0.0, description="over the best so far; less is too little")
    patience: PositiveInt = Field(1, description="rounds in a row that add too little")


class RepeatConfig(JobConfig):
    """Stages that are gone through several times, each round with the model of the one before."""

    kind: Literal["repeat"]
    times: PositiveInt = Field(description="rounds, at most", examples=[3])
    stages: list[dict[str, Any]] = Field(
        min_length=1,
        description="what a round is made of; in round 2, stage sft is called sft-2",
        examples=[[{"kind": "sft", "steps": 40}]],
    )
    until: StopRule | None = Field(
        None, description="when to stop earlier; null: never", examples=[{"metric": "accuracy"}]
    )


class UntilConfig(JobConfig):
    """Whether the rounds of a ``repeat`` go on; written behind each of them."""

    kind: Literal["until"]
    rule: StopRule
    rounds: list[list[str]] = Field(
        min_length=1, description="names of stages, by round", examples=[[["sft-1"], ["sft-2"]]]
    )
    done: PositiveInt = Field(description="rounds that are done", examples=[1])


def expand(tree: Tree) -> None:
    """Write out every ``repeat`` of a recipe, in place, with the source of each value."""
    stages = tree.data.get("stages")
    if not isinstance(stages, list) or not any(map(_is_repeat, stages)):
        return
    out: list[Any] = []
    taken_from: list[Path] = []  # where in the recipe each stood
    for i, stage in enumerate(stages):
        at: Path = ("stages", i)
        if not _is_repeat(stage) or not _valid(stage, at, tree):
            out.append(stage)
            taken_from.append(at)
            continue
        for found, place in _written_out(stage, at, tree):
            out.append(found)
            taken_from.append(place)
        _measure_all(tree.data.get("evaluations"), stage)
    _move(tree, taken_from)
    tree.data["stages"] = out
    expand(tree)  # rounds inside of rounds


def _is_repeat(stage: Any) -> bool:
    return (
        isinstance(stage, dict)
        and stage.get("kind") == KIND
        and isinstance(stage.get("stages"), list)
    )


def _valid(stage: Mapping[str, Any], at: Path, tree: Tree) -> bool:
    try:
        RepeatConfig.model_validate_json(json.dumps(stage), strict=True)
    except ValidationError as error:
        part = Tree(stage, {p[2:]: s for p, s in tree.sources.items() if p[:2] == at})
        found = explain(error, part, RepeatConfig)
        tree.problems += [Problem((*at, *p.path), p.source, p.text) for p in found]
        stage["stages"] = None  # type: ignore[index]  # told; it is not looked at again
        return False
    return True


def _name(stage: Any) -> str:
    return str(stage.get("name") or stage.get("kind") or "") if isinstance(stage, dict) else ""


def _written_out(repeat: dict[str, Any], at: Path, tree: Tree) -> list[tuple[dict[str, Any], Path]]:
    """The stages of all rounds, each with the place that it was read from."""
    names = [_name(s) for s in repeat["stages"]]
    times = repeat["times"]
    written = [*names, _name(repeat)]
    rounds = [[f"{n}-{r}" for n in written] for r in range(1, times + 1)]
    found: list[tuple[dict[str, Any], Path]] = []
    for number in range(1, times + 1):
        for j, inner in enumerate(repeat["stages"]):
            place: Path = (*at, "stages", j)

            def newest(name: str, j: int = j, number: int = number) -> str | None:
                """What a name means here; itself if it is no stage of a round, None: not yet."""
                if name not in names:
                    return name
                last = number if names.index(name) < j else number - 1
                return f"{name}-{last}" if last else None

            stage = copy.deepcopy(inner)
            stage["name"] = f"{names[j]}-{number}"
            _rename(stage, newest, place, tree)
            found.append((stage, place))
        if repeat.get("until"):
            decision = {"kind": "until", "name": f"{_name(repeat)}-{number}", "done": number}
            found.append(({**decision, "rule": repeat["until"], "rounds": rounds}, at))
    return found


def _rename(node: Any, newest: Callable[[str], str | None], place: Path, tree: Tree) -> None:
    """Names of stages inside of one, as they are written out."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if key == "from" and isinstance(value, str):
            job, dot, artifact = value.partition(".")
            if (name := newest(job)) is None:
                text = f"{value}: round 1 has nothing to read there; write it before"
                tree.problems.append(Problem((*place, key), tree.source(place), text))
            else:
                node[key] = f"{name}{dot}{artifact}"
        elif key in ("start_from", "init_from") and isinstance(value, str):
            node[key] = newest(value)  # in round 1 None: the default
        elif isinstance(value, dict | list):
            _rename(value, newest, (*place, key), tree)


def _measure_all(evaluations: Any, repeat: Mapping[str, Any]) -> None:
    """What is measured after a stage of a round is measured after it in every round."""
    names = {_name(s) for s in repeat["stages"]}
    for evaluation in evaluations if isinstance(evaluations, list) else ():
        said = evaluation.get("stages") if isinstance(evaluation, dict) else None
        if isinstance(said, list):
            every = [
                [f"{n}-{r}" for r in range(1, repeat["times"] + 1)] if n in names else [n]
                for n in said
            ]
            evaluation["stages"] = [n for some in every for n in some]


def _move(tree: Tree, taken_from: list[Path]) -> None:
    """The sources of values, and the problems, where these now stand."""
    sources = {p: s for p, s in tree.sources.items() if p[:1] != ("stages",) or len(p) == 1}
    problems = [p for p in tree.problems if p.path[:1] != ("stages",) or len(p.path) < 2]
    for i, old in enumerate(taken_from):
        inner = {p[len(old) :]: s for p, s in tree.sources.items() if p[: len(old)] == old}
        sources |= {("stages", i, *rest): s for rest, s in inner.items()}
        problems += [
            Problem(("stages", i, *p.path[len(old) :]), p.source, p.text)
            for p in tree.problems
            if p.path[: len(old)] == old
        ]
    seen: dict[tuple[Any, str], Problem] = {(p.source, p.text): p for p in reversed(problems)}
    tree.sources, tree.problems = sources, [p for p in problems if seen[p.source, p.text] is p]

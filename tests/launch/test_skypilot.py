"""The task that SkyPilot is given is one that its released schema takes; see tests/contracts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from shardwise.config import yaml12
from shardwise.launch import skypilot
from shardwise.launch.cluster import ClusterJob, Task
from shardwise.launch.profile import ClusterProfile, SkyPilotProfile
from tests.cli.conftest import Command, shardwise, write_recipe  # noqa: F401  # a fixture

SCHEMAS = json.loads((Path(__file__).parents[1] / "contracts" / "skypilot.json").read_text())
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
    "boolean": bool, "null": type(None),
}  # fmt: skip
KNOWN = {
    "type", "anyOf", "oneOf", "properties", "additionalProperties", "required", "items", "pattern",
    "minimum", "maximum", "uniqueItems",
}  # fmt: skip


def problems(value: Any, schema: Any, at: str = "task") -> list[str]:
    """What JSON Schema has against a value, for the words that these schemas use."""
    assert schema.keys() <= KNOWN, schema
    for word in ("anyOf", "oneOf"):
        if options := schema.get(word):
            found = [problems(value, option, at) for option in options]
            return [] if [] in found else [p for part in found for p in part]
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds and not any(isinstance(value, TYPES[kind]) for kind in kinds):
        return [f"{at}: {value!r} is no {kinds}"]
    found = []
    if isinstance(value, dict):
        found = [f"{at}.{key} is missing" for key in schema.get("required", []) if key not in value]
        inner, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, item in value.items():
            rule = inner.get(key, others)
            if rule is False:
                found.append(f"{at}.{key} is unknown")
            elif rule is not True:
                found += problems(item, rule, f"{at}.{key}")
    if isinstance(value, list):
        found = [p for item in value for p in problems(item, schema.get("items", {}), at)]
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        found.append(f"{at}: {value!r} does not match")
    if isinstance(value, int) and not schema.get("minimum", value) <= value:
        found.append(f"{at}: {value} is too small")
    return found


def job(**more: Any) -> ClusterJob:
    section = {"volume": "runs", "infra": "k8s/ctx", "cpus": "8+", "memory": "32+", **more}
    gpus = {"gpus": 8} if "accelerator" in more else {"cpu_ranks": 2}
    profile = ClusterProfile(
        shared="/shared",
        image="x/y:1",
        secrets=["HF_TOKEN"],
        skypilot=SkyPilotProfile(**section),
        **gpus,  # type: ignore[arg-type]
    )
    return ClusterJob("Big_run", Task("/shared/run", ("r.yaml",)), 2, ".", 25.0, profile)


@pytest.mark.parametrize("version", SCHEMAS)
@pytest.mark.parametrize("more", [{}, {"accelerator": "H100", "spot": True, "disk_size": 500}])
def test_the_schema_takes_it(version: str, more: dict[str, Any]) -> None:
    task = skypilot.document(job(**more))
    schema = SCHEMAS[version]
    assert problems(task, schema["task"]) == []
    assert problems(task["resources"], schema["resources"], "resources") == []
    assert yaml12.parse(skypilot.render(job(**more)), "").data == task
    task["resources"] |= {"use_spot": "yes", "nonsense": 1, "infra": "moon"}
    assert len(problems(task["resources"], schema["resources"])) == 3


def test_secrets_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop1234")
    assert "abcdefghijklmnop" not in skypilot.render(job())
    assert skypilot.document(job())["secrets"] == {"HF_TOKEN": None}


def test_what_is_given_to_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "sky"
    last = f'for f; do :; done; cp "$f" {tmp_path}/t'
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\n{last}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop1234")
    skypilot.submit(job(), "what was rendered")
    assert (tmp_path / "t").read_text() == "what was rendered"
    words = (tmp_path / "words").read_text()
    assert words.startswith("jobs launch --yes --detach-run --secret HF_TOKEN /")


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "runs/tiny is not in /shared"), (["run_dir=/shared/x"], "not in the folder that SkyPil")],
)
def test_what_the_nodes_would_not_see_is_refused(
    words: list[str],
    message: str,
    tmp_path: Path,
    shardwise: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace(f"run_dir: {tmp_path}/run\n", ""))
    (tmp_path / "below").mkdir()
    profile = tmp_path / "sky.yaml"
    profile.write_text("shared: /shared\ncpu_ranks: 1\nskypilot: {volume: v}\n")
    monkeypatch.chdir(tmp_path / "below")
    given = "../tiny.yaml" if words else str(recipe)
    if not words:
        monkeypatch.chdir(tmp_path)
        given = "tiny.yaml"
    code, _, err = shardwise("launch", "skypilot", given, *words, "--profile", profile)
    assert code == 2 and message in err

"""Every key of a recipe is described, with an example that loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from shardwise.config import reference, registry, yaml12
from shardwise.config.run import RunConfig
from shardwise.config.section import Section
from shardwise.errors import UserError
from tests.cli.conftest import Command, shardwise  # noqa: F401  # a fixture


def keys() -> Iterator[tuple[str, type[Section], Any, FieldInfo]]:
    """(path, a class that has the key, what holds it in the reference, the field), each once."""
    registry.discover()
    seen = set()

    def visit(place: Any, path: str) -> Iterator[tuple[str, type[Section], Any, FieldInfo]]:
        identity = reference._identity(place)
        if identity in seen:
            return
        seen.add(identity)
        for part, at, kind in reference._parts(place, path):
            cls = part
            if isinstance(part, reference._Choice):
                cls = part.table[part.default or next(iter(part.table))]
            for name, (owner, field) in reference._held(place, kind).items():
                yield f"{at}.{name}".lstrip("."), cls, owner, field
                if (inner := reference._inside(field)) is not None:
                    yield from visit(inner, f"{at}.{name}".lstrip("."))

    yield from visit(RunConfig, "")


KEYS = list(keys())


def test_every_key_is_described_once() -> None:
    told = [key for block in reference.blocks() for key in block.keys]
    assert sorted(key.path for key in told) == sorted(path for path, *_ in KEYS)
    assert len({key.path for key in told}) == len(told) > 400
    assert [key.path for key in told if not key.meaning] == []
    homes = {block.path for block in reference.blocks()}
    assert all(key.section in homes for key in told)
    assert [block.path for block in reference.blocks() if not block.meaning] == []
    # What a class says to people comes before what it says to whoever derives from it.
    assert not [b.path for b in reference.blocks() if b.meaning.startswith("See ")]


def test_every_example_loads() -> None:
    wrong = []
    for path, cls, owner, field in KEYS:
        example = reference.shown(owner, name := path.rpartition(".")[2], field)
        if isinstance(owner, reference._Choice) and name == owner.key:
            cls = owner.table[example[name]]
        section = reference.minimal(cls) | example
        try:
            cls.model_validate_json(json.dumps(section), strict=True)
        except ValueError as error:
            wrong.append(f"{path}: {example}: {error}")
    assert not wrong, "\n".join(wrong)


def test_examples_are_yaml_that_says_more_than_the_default() -> None:
    same = 0
    for block in reference.blocks():
        for key in block.keys:
            assert key.name in yaml12.parse(key.example, key.path).data
            same += key.example == f"{key.name}: {key.default}"
    assert same < 0.4 * len(KEYS)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("stages.sft.batch.seq_len", "256"),
        ("stages.0.batch.seq_len", "256"),
        ("stages.lr", None),
        ("stages.optimizer.lr", "0.0003"),
        ("stages.optimizer.lion.lr", "0.0001"),
        ("engine.config", "null"),
        ("stages.dpo.loss.simpo.beta", "2.0"),
        ("stages.grpo.reward.parts.user.function", None),
    ],
)
def test_a_key_is_found_by_its_path(path: str, expected: str | None) -> None:
    if path == "stages.lr":
        with pytest.raises(UserError, match="stages has no 'lr'"):
            reference.find(path)
        return
    key, block = reference.find(path)
    assert key is not None and key.default == expected and block is None


def test_the_command_explains(shardwise: Command) -> None:  # noqa: F811
    code, out, _ = shardwise("config", "explain", "stages.sft.batch.seq_len")
    assert code == 0 and "example  seq_len: 256" in out and "default  256" in out
    code, out, _ = shardwise("config", "explain", "stages.adapter")
    assert code == 0 and "kinds    lora, dora, bottleneck" in out and "quantise" in out
    code, _, err = shardwise("config", "explain", "stages.sft.bacth")
    assert code == 2 and "did you mean 'batch'" in err
    code, _, err = shardwise("config", "explain", "seed.x")
    assert code == 2 and "seed is a value" in err
    code, out, _ = shardwise("config", "explain", "seed", "--json", "-")
    assert json.loads(out)["key"]["default"] == "0"

"""Recipes: what is right loads as written, what is wrong is said with key, source and mend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.config import yaml12
from shardwise.config.export import print_config, provenance_json, resolved_yaml
from shardwise.config.load import LoadedConfig, leaves, load_config, load_section
from shardwise.config.section import PositiveInt, Section
from shardwise.config.source import dotted
from shardwise.errors import ConfigError
from tests.config.toy import RECIPE

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_every_value_has_its_source(recipe: Path) -> None:
    loaded = load_config(recipe, ["stages.again.steps=7", "engine.timeout_s=5"])
    at = {key: str(source) for key, source in loaded.provenance.items()}
    assert at["model.width"] == f"{recipe}:2"
    assert at["seed"] == "default"
    assert at["stages.0.optimizer.lr"] == f"{recipe}:8"
    assert at["stages.0.sources.0.path"] == f"{recipe}:10"
    assert at["stages.1.steps"] == "command line override 1"
    assert loaded.config.stages[1].steps == 7
    # a stage's engine: its own key, else the top-level one, else the default
    assert at["stages.1.engine.recompute"] == f"{recipe}:14"
    assert at["stages.1.engine.precision"] == f"{recipe}:3"
    assert at["stages.1.engine.timeout_s"] == "command line override 2"
    assert at["stages.1.engine.layout"] == "default"
    assert [s.engine.precision for s in loaded.config.stages] == ["bf16", "bf16"]
    assert set(at) == {dotted(p) for p, _ in leaves(loaded.config.model_dump(mode="json"))}


def test_print_config_shows_each_value_and_source(recipe: Path) -> None:
    lines = print_config(load_config(recipe, ["seed=3"])).splitlines()
    assert any(re.fullmatch(r"seed +=  ?3 +# command line override 1", line) for line in lines)
    assert any(re.fullmatch(rf'name += "toy" +# {recipe}:1', line) for line in lines)
    assert len({line.index("  # ") for line in lines}) == 1  # aligned


def test_resolved_yaml_loads_as_the_same_config(recipe: Path, tmp_path: Path) -> None:
    loaded = load_config(recipe, ["name='1e3'", "logging.wandb_project='off'"])
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(loaded.config))
    assert load_config(again).config == loaded.config


def test_a_mapping_is_a_recipe_too() -> None:
    data = {"model": {"family": "toy", "weights": Path("w")}, "stages": [{"kind": "learn"}]}
    with pytest.raises(ConfigError, match=r"stages\.0\.steps \(given by the caller\).*required"):
        load_config(data)
    data["stages"][0]["steps"] = 3  # type: ignore[index]
    loaded = load_config(data, ["stages.0.steps=4"])
    assert loaded.config.stages[0].steps == 4
    assert str(loaded.provenance["model.weights"]) == "given by the caller"
    assert data["stages"][0]["steps"] == 3  # type: ignore[index]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("engine.precisiom=fp32", ["engine.precisiom", "unknown key", "did you mean 'precision'?"]),
        ("engine.precision=fp23", ["'fp23'", "fp32, bf16, fp16, fp64", "did you mean 'fp32'?"]),
        ("seed='3'", ["seed", "'3' (text)", "an integer, at least 0", "write 3 without quotes"]),
        ("seed=1_000", ["'1_000' (text)", "write 1000 without underscores"]),
        ("seed=3.0", ["3.0 (a number)", "an integer"]),
        ("seed=true", ["true (a boolean)", "an integer"]),
        ("seed=null", ["null (nothing)", "an integer"]),
        ("seed=-1", ["-1 (a number)", "at least 0"]),
        ("name=3", ["3 (a number)", "allowed: text"]),
        ("engine.timeout_s=true", ["true (a boolean)", "a number, at least 1e-06"]),
        ("engine.timeout_s=.nan", ["a number, at least 1e-06"]),
        ("engine.timeout_s=1e999", ["a number, at least 1e-06"]),
        ("engine.compile=yes", ["'yes' (text)", "true or false or auto", "write true"]),
        ("stages.0.checkpoint.asynchronous=off", ["'off' (text)", "true or false", "write false"]),
        ("model.family=toys", ["model.family", "allowed: one of toy", "did you mean 'toy'?"]),
        ("model.family=[1]", ["model.family", "a list of 1", "one of toy"]),
        ("model=3", ["model", "expected a mapping with the key 'family'"]),
        ("model.widthh=3", ["model.widthh", "did you mean 'width'?"]),
        ("model.width=0", ["model.width", "an integer, at least 1"]),
        ("model.weights=3", ["model.weights", "a path"]),
        ("stages.0.kind=learm", ["stages.0.kind", "did you mean 'learn'?"]),
        ("stages.0.steps={a: 1}", ["stages.0.steps", "a mapping of 1", "an integer"]),
        ("stages.0.sources.0.weightt=1", ["stages.0.sources.0.weightt", "did you mean 'weight'?"]),
        ("stages.0.sources.0.weight=-1", ["stages.0.sources.0.weight", "at least 0"]),
        ("stages.0.sources.0.kind=txt", ["stages.0.sources.0.kind", "did you mean 'text'?"]),
        ("stages.0.sources.0={path: a}", ["stages.0.sources.0.kind", "required", "text, table"]),
        ("stages.0.weights={a: b}", ["stages.0.weights.a", "'b' (text)", "a number"]),
        ("stages.0.ratio=fast", ["stages.0.ratio", "a number or auto"]),
        ("stages.0.shape=[1, x]", ["stages.0.shape.1", "'x' (text)", "an integer"]),
        ("stages=[]", ["stages", "a list of 0", "of length at least 1"]),
        ("stages.agaim.steps=1", ["stages.agaim", "named learn, again", "did you mean 'again'?"]),
        ("stages.7.steps=1", ["stages.7", "2 items, 0 to 1"]),
        ("stages.0.name=again", ["stages share the name again"]),
        ("name.x=1", ["name", "no 'x' inside"]),
        ("stages.0.name=''", ["stages.0.name", "of length at least 1"]),
        ("seed", ["'seed' is not of the form section.key=value"]),
        ("=3", ["not of the form"]),
        ("a..b=3", ["not of the form"]),
        ("seed=[1", ["not readable as YAML", "not closed"]),
        ("seed=!!python/object:os.system x", ["the tag", "not allowed"]),
    ],
)
def test_what_is_wrong_is_said(recipe: Path, override: str, parts: list[str]) -> None:
    message = refused(recipe, override)
    if override != "stages.0.name=again":  # two values clash; neither alone is the source
        assert "command line override 1" in message
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message


def test_all_problems_at_once_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(RECIPE.replace("steps: 20", "stepz: 20").replace("bf16", "bf17") + "sed: 1\n")
    message = refused(path, "model.width=x")
    assert message.startswith(f"{path}: 5 problems\n")
    for part in (
        f"engine.precision ({path}:3): given 'bf17'",
        f"stages.1.stepz ({path}:13): unknown key; did you mean 'steps'?",
        f"stages.1.steps ({path}:11): this key is required; allowed: an integer, at least 1",
        f"sed ({path}:15): unknown key; did you mean 'seed'?",
        "model.width (command line override 1): given 'x'",
    ):
        assert message.count(part) == 1, message
    assert message.count("bf17") == 1  # not once more for each stage that inherits it


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: [a\nseed: 1\n", [":2:", "not readable as YAML"]),
        ("name: a\n\tseed: 1\n", [":2:1:", "spaces, not tabs"]),
        ("name: a: b\n", [":1:8:", "needs quotes"]),
        ("name: 'a\n", ["a quote"]),
        ("a: 1\n---\nb: 2\n", ["one document"]),
        ("name: a\nname: b\n", ["name (", ":2", "given twice, first at", ":1"]),
        ("name: !!python/object/apply:os.system [touch x]\n", [":1:7:", "the tag", "not allowed"]),
        ("name: *x\n", [":1:7:", "anchor"]),
        ("name: \x07\n", [":1:7:", "U+0007"]),
        ("? [a, b]\n: c\n", ["a key must be a name"]),
        ("seed: " + "9" * 5000, ["5000 digits"]),
        ("", ["empty"]),
        ("- a\n", ["not a mapping"]),
        ('name: "\\ud800"\n', ["surrogate"]),
        ("&a [*a]\n", ["more than 40 levels"]),
        ("[" * 5000, ["levels"]),
    ],
)
def test_unreadable_yaml(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refused(path)
    for part in [str(path), *parts]:
        assert part in message


def test_alias_bomb_is_refused(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(levels))
    assert "without aliases" in refused(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(RECIPE)
    missing = refused(tmp_path / "quickstrat.yaml")
    assert "no such file" in missing and f"did you mean {tmp_path / 'quickstart.yaml'}?" in missing
    assert "is a folder" in refused(tmp_path) and "quickstart.yaml" in refused(tmp_path)
    assert "not there either" in refused(tmp_path / "no" / "x.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: a\nx: x\xe9\n")
    assert "latin.yaml:2:5: byte 0xe9 is not UTF-8" in refused(tmp_path / "latin.yaml")
    assert "cannot be read" in refused(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("5", 5.0), (".5", 0.5), ("1.", 1.0), ("+1.5E+2", 150.0), ("0x10", 16.0),
        ("0o17", 15.0), ("017", 17.0),
    ],
)  # fmt: skip
def test_numbers_are_yaml_1_2(recipe: Path, text: str, value: float) -> None:
    assert load_config(recipe, [f"engine.timeout_s={text}"]).config.engine.timeout_s == value


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "y", "N", "2024-01-01"])
def test_words_of_yaml_1_1_are_text(recipe: Path, word: str) -> None:
    assert load_config(recipe, [f"name={word}"]).config.name == word


# --- properties ---------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8"), max_size=20)
VALID = {
    "name": st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    "logging.wandb_project": names,
    "seed": st.integers(0, 2**63 - 1),
    "engine.timeout_s": st.floats(1e-6, 2e6) | st.integers(1, 2**20),
    "engine.compile": st.booleans() | st.just("auto"),
    "engine.precision": st.sampled_from(["fp32", "bf16", "fp16", "fp64"]),
    "stages.0.steps": st.integers(1, 2**31 - 1),
    "stages.again.batch": st.fixed_dictionaries({"seq_len": st.integers(1, 99)}),
    "stages.0.optimizer.no_decay": st.lists(names, max_size=4),
    "stages.0.weights": st.dictionaries(names, st.floats(-1e9, 1e9), max_size=3),
    # A home's ~ and a variable's $ are replaced, or refused.
    "stages.0.sources.0.path": st.text(
        st.characters(codec="ascii", min_codepoint=33, exclude_characters="~$"), min_size=1
    ),
}


def load(overrides: list[str]) -> LoadedConfig:
    import yaml

    return load_config(yaml.safe_load(RECIPE.replace("1e-3", "0.001")), overrides)


@pytest.mark.parametrize("text", ["\x85", " \u2028", "\ufeffa", "a\nb", " ", "~", "1e3", "0o7", ""])
def test_texts_survive_the_resolved_yaml(text: str) -> None:
    loaded = load([f"logging.wandb_project={json.dumps(text)}"])
    assert loaded.config.logging.wandb_project == text
    assert load_config_text(resolved_yaml(loaded.config)).config == loaded.config


@quick
@given(st.data(), st.sampled_from(sorted(VALID)))
def test_any_valid_override_round_trips(data: st.DataObject, key: str) -> None:
    value = data.draw(VALID[key])
    loaded = load([f"{key}={json.dumps(value)}"])
    path = key.replace("again", "1")
    found: object = loaded.config.model_dump(mode="json")
    for part in path.split("."):
        found = found[int(part) if part.isdigit() else part]  # type: ignore[index]
    if isinstance(value, dict) and path == "stages.1.batch":
        found = {k: found[k] for k in value}  # type: ignore[index]
    if path.endswith("path"):
        found = Path(str(found))
        value = Path(value)
    assert found == value and isinstance(found, bool) == isinstance(value, bool)
    again = load_config_text(resolved_yaml(loaded.config))
    assert again.config == loaded.config


def load_config_text(text: str) -> LoadedConfig:
    from shardwise.config import yaml12

    return load_config(yaml12.parse(text, "text").data)


KEYS = [
    "seed",
    "run_dir",
    "logging.tensorboard",
    "logging.wandb_project",
    "engine.precision",
    "engine.max_grad_norm",
    "stages.0.optimizer.weight_decay",
]


@quick
@given(st.sampled_from(KEYS), st.data())
def test_a_single_typo_gives_the_nearest_name(key: str, data: st.DataObject) -> None:
    section, _, name = key.rpartition(".")
    spot = data.draw(st.integers(0, len(name) - 1))
    kind = data.draw(st.sampled_from(["drop", "double", "change", "swap"]))
    typo = {
        "drop": name[:spot] + name[spot + 1 :],
        "double": name[:spot] + name[spot] + name[spot:],
        "change": name[:spot] + "q" + name[spot + 1 :],
        "swap": name[:spot] + name[spot : spot + 2][::-1] + name[spot + 2 :],
    }[kind]
    if typo == name:
        return
    wrong = f"{section}.{typo}".lstrip(".")
    with pytest.raises(ConfigError) as caught:
        load([f"{wrong}=1"])
    assert f"{wrong} (command line override 1): unknown key" in str(caught.value)
    assert f"did you mean {name!r}?" in str(caught.value)


junk = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [*"[]{}:,#&*!|>'\"%@`-?\n\t ~=<.", "a", "0", "1e3", "stages", "model", "name", "<<", ".inf"]
    ),
    max_size=25,
).map("".join)


@quick
@given(junk)
def test_no_yaml_makes_a_traceback(tmp_path: Path, text: str) -> None:
    path = tmp_path / "junk.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        load_config(path)


@quick
@given(st.lists(st.tuples(st.sampled_from([*VALID, "stages", "model", "", "x"]), junk)))
def test_no_override_makes_a_traceback(pairs: list[tuple[str, str]]) -> None:
    try:
        load([f"{key}={value}" for key, value in pairs])
    except ConfigError as error:
        assert "command line override" in str(error)


@quick
@given(st.binary(max_size=40))
def test_no_bytes_make_a_traceback(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "junk.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        load_config(path)


def test_provenance_is_json_and_redacted(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    loaded = load_config(recipe, ["name=very-secret-value", "run_dir='https://u:pw@host/x'"])
    text = json.dumps(provenance_json(loaded)) + resolved_yaml(loaded.config)
    text += print_config(loaded)
    assert "very-secret" not in text and "u:pw" not in text
    assert loaded.config.name == "very-secret-value"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(("name", name) for name in ("../up", ".hidden", "a/b", "", "-x", "a b", "x" * 101)),
        *(("stages.0.name", name) for name in ("..", "a.b", "a/b", "-x", "a\n")),
    ],
)
def test_names_become_folders(recipe: Path, key: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} \(.*cannot name a folder; allowed: up to"):
        load_config(recipe, [f"{key}={json.dumps(name)}"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{path: t.json}", "path is given, but kind bytes reads no file"),
        ("{kind: bytes, path: t.json}", "path is given, but kind bytes reads no file"),
        ("{kind: file}", "kind file needs a path"),
        ("{kind: tiktoken}", "kind tiktoken needs a path"),
        ("{kind: sentencepiece}", "kind sentencepiece needs a path"),
    ],
)
def test_a_tokenizer_s_path_and_kind_agree(recipe: Path, section: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, [f"tokenizer={section}"])


def test_an_empty_list_has_no_range(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="no such item; evaluations is empty"):
        load_config(recipe, ["evaluations=[]", "evaluations.0.kind=x"])


def test_a_file_of_countless_values_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted while it is read: the rest of it, which no parser reaches, is not even YAML."""
    monkeypatch.setattr(yaml12, "MAX_NODES", 1000)
    with pytest.raises(ConfigError, match=r"x:1:.*more than 1000 values"):
        yaml12.parse("[" + "1," * 2000 + "}", "x")


@quick
@given(st.text("ab $\\'\"\n\t\u2028\x85 #:-|>%&*{}[]éß\U0001f600", max_size=40))
def test_scripts_survive_yaml_that_is_written_to_be_read(text: str) -> None:
    data = {"run": text, "words": [text]}
    assert yaml12.parse(yaml12.readable(data), "x").data == data


def test_a_script_is_written_as_lines() -> None:
    assert yaml12.readable({"run": "set -e\necho $(a)\n"}) == "run: |\n  set -e\n  echo $(a)\n"


class _Place(Section):
    name: str
    nodes: PositiveInt = 1


def test_any_section_is_read_as_strictly_as_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "place.yaml"
    path.write_text("name: here\nnodes: 2\n")
    assert load_section(path, _Place) == _Place(name="here", nodes=2)
    path.write_text("names: here\nnodes: two\n")
    with pytest.raises(ConfigError) as error:
        load_section(path, _Place)
    for part in ("3 problems", f"names ({path}:1)", "did you mean 'name'", f"nodes ({path}:2)"):
        assert part in str(error.value)
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="not a mapping; known keys: name, nodes"):
        load_section(path, _Place)

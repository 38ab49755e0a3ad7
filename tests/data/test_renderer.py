"""Hostile chat templates and tokenizers end with a clear error, in bounded time and memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from shardwise.data import guard, renderer
from shardwise.data.chat import CHATML, encode_chat, render
from shardwise.data.tokenizer import ByteTokenizer, load_tokenizer
from shardwise.errors import DataError
from tests.support.module_python import module_python

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LOOP, "ran for more than 0.5 s"),
        ("{{ 'x' * 10**10 }}", "needs more than 512 MiB|ran for more"),
        ("{% set ns = namespace(x='xx') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}"
         "{% endfor %}{{ ns.x }}", "needs more than 512 MiB|ran for more"),
        ("{{ '%10000000000d' % 1 }}", "MiB|failed|more than"),
        ("{{ 10 ** (10 ** 9) }}", "ran for more than|MiB|failed"),
        ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", "nested too deeply|does not parse"),
        ("{% if x %}" * 20_000 + "{% endif %}" * 20_000, "nested too deeply|does not parse"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply|failed"),
    ],
)  # fmt: skip
def test_templates_are_bounded(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    render(ByteTokenizer("{{ messages[0].content }}!"), CHAT)  # the child is there
    monkeypatch.setattr(renderer, "SECONDS", 0.5 if "0.5" in message else 2.0)
    with pytest.raises(DataError, match=f"chat template .*({message})"):
        render(ByteTokenizer(source), CHAT)
    assert render(ByteTokenizer("{{ messages[0].content }}!"), CHAT) == "hi!"  # and again


def test_our_own_template_needs_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "_Child", lambda: pytest.fail("started"))
    monkeypatch.setattr(renderer, "_child", None)
    assert encode_chat(ByteTokenizer(), CHAT) == encode_chat(ByteTokenizer(CHATML), CHAT)


def test_a_fork_gets_a_child_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer("{{ messages[0].content }}!")
    render(tokenizer, CHAT)
    first = renderer._child
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert render(tokenizer, CHAT) == "hi!" and renderer._child is not first
    renderer._child.end()  # type: ignore[union-attr]
    monkeypatch.setattr(renderer, "_child", first)


def write(folder: Path, change: object) -> Path:
    """The byte tokenizer's folder, with another normalizer or splitter."""
    ByteTokenizer().save(folder)
    (folder / "hashes.json").unlink()
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if isinstance(change, normalizers.Normalizer):
        backend.normalizer = change
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([change, backend.pre_tokenizer])
    (folder / "tokenizer.json").write_text(backend.to_str())
    return folder


def test_regexes_that_backtrack_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = pre_tokenizers.Split(Regex(r"(a|aa|a)+$"), behavior="isolated")
    tokenizer = load_tokenizer(write(tmp_path, split))
    assert tokenizer.encode("abc") == ByteTokenizer().encode("abc")
    calls = (
        lambda: tokenizer.encode("a" * 200 + "b"),
        lambda: tokenizer.encode_batch(["a" * 200 + "b"]),
        lambda: tokenizer.encode_with_offsets("a" * 200 + "b"),
    )
    for call in calls:
        with pytest.raises(DataError, match=r"regular expressions fail on .*retry-limit"):
            call()
    monkeypatch.setattr(guard, "SECONDS", 0.01)
    with pytest.raises(DataError, match=r"regular expressions take more than 0\.01 s"):
        calls[0]()


def test_normalizers_that_blow_text_up_are_refused(tmp_path: Path) -> None:
    for k, steps in enumerate(
        ([normalizers.Replace("a", "b" * 100_000)], [normalizers.Replace("a", "aa")] * 30)
    ):
        with pytest.raises(DataError, match="normalizer may make"):
            load_tokenizer(write(tmp_path / str(k), normalizers.Sequence(steps)))
    usual = normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.Prepend("\u2581")])
    load_tokenizer(write(tmp_path / "usual", usual))


def test_lone_surrogates_reach_no_tokenizer() -> None:
    for tokenizer in (ByteTokenizer(),):
        for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
            with pytest.raises(DataError, match="a lone surrogate is no text"):
                encode("cut \ud83d")


def test_known_patterns_run_without_a_thread() -> None:
    spec = json.dumps({"pre_tokenizer": {"pattern": {"Regex": "x+"}}})
    assert guard.needs_bound(spec, frozenset())
    assert not guard.needs_bound(spec, frozenset({"x+"}))


def test_the_child_finds_the_libraries_of_a_module_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renderer, "_child", None)
    monkeypatch.setattr(sys, "executable", module_python(tmp_path))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    tokenizer = ByteTokenizer("{{ messages[0].content }}!")
    why = r"the template renderer could not be started: .*libpython\.so: cannot open"
    with pytest.raises(DataError, match=why):
        render(tokenizer, CHAT)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert render(tokenizer, CHAT) == "hi!"
    renderer._child.end()  # type: ignore[union-attr]
    monkeypatch.setattr(renderer, "_child", None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"could not be started: .*absent"):
        render(tokenizer, CHAT)

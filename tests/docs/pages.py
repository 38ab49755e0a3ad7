"""Runs the blocks of a page, in order, in a folder of its own; sybil finds them.

- ``sh``: each command must end with 0. Those of ours run in this process, what they train in the
  rank pool; others in a shell.
- ``python``: executed, all of a page in one namespace. Its test functions are called.
- ``yaml`` and ``json``: a recipe, or sections of one; a cluster's profile; other JSON is only read.
- ``text``: what the command before it printed, ``...`` for what may differ.

A block that follows a line like "`recipe.yaml`:" is written to a file of that name. Comments in
front of a block, which readers do not see, change this:

- ``<!-- no-run: REASON -->``
- ``<!-- run with: WORDS -->``: added to each command of ours, to make it small;
  ``@small`` and others are sets of them.
- ``<!-- exit code: N -->``: of the last command.
- ``<!-- given: NAME ... -->``: what the page needs and does not make; see `GIVEN`.
- ``<!-- fresh -->``: commands run in processes of their own, where what pip installed is known.
- ``<!-- slow -->``: this block, and all behind it, are for ``make prove``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sybil import Document, Example, Region
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from shardwise import terminal
from shardwise.cli.main import main
from shardwise.config import registry, yaml12
from shardwise.config.load import load_config
from shardwise.config.reference import minimal
from shardwise.config.run import RunConfig
from shardwise.launch.profile import load_profile
from shardwise.report.api import report
from shardwise.report.summary import summary_lines
from shardwise.resilience.ending import write_ending
from shardwise.stages.run import preflight, run_rank
from shardwise.sweep.config import load_sweep
from shardwise.sweep.plan import make_plan
from tests.support.pool import RankPool

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`([\w./-]+\.\w+)`[^`\n]*:\s*$")
COMMENT = re.compile(r"\s*<!-- (?P<name>[a-z -]+?)(?:: (?P<value>[^\n]*?))? -->\s*$")
NAMES = {"no-run", "run with", "exit code", "given", "slow", "fresh", "table", "generated"}
WRITTEN_ONLY = {"markdown", "toml"}
# What makes the recipes of pages small: the quickstart, one on a model that is given, one of GRPO.
SMALL = [
    "tokenizer={kind: bytes}",
    "stages.pretrain.data={sources: [{kind: text, path: corpus/*.txt}]}",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.ffn_size=64",
    "engine.compile=false",
    "engine.layout=auto",
    "engine.precision=fp32",
    "stages.pretrain.steps=4",
    "stages.pretrain.schedule.warmup_steps=1",
    "stages.pretrain.validation.max_batches=1",
    "stages.sft.steps=2",
    "stages.sft.engine.layout=auto",
    "stages.sft.batch.global_batch=4",
    "stages.sft.batch.micro_batch=4",
    "stages.sft.batch.seq_len=96",
    "stages.sft.num_problems=8",
    "stages.sft.schedule.warmup_steps=1",
    "stages.grpo.steps=2",
    "stages.grpo.num_problems=16",
    "stages.grpo.engine.layout=auto",
    "stages.grpo.batch.global_batch=4",
    "stages.grpo.batch.micro_batch=4",
    "stages.grpo.samples_per_prompt=2",
    "stages.grpo.schedule.warmup_steps=1",
    "stages.grpo.keep_rollouts_every=1",
    "evaluations.problems.stages=[grpo]",
    "evaluations.continuations.stages=[grpo]",
    "stages.pretrain.data.validation=[{kind: text, path: corpus/held_out.text}]",
    "evaluations.problems.num_problems=4",
    "evaluations.continuations.sampling.max_new_tokens=4",
]
QUICK = ["engine.compile=false", "stages.sft.steps=2", "stages.sft.schedule.warmup_steps=1"]
REINFORCE = [
    "engine.compile=false", "stages.grpo.steps=2", "stages.grpo.batch.global_batch=4",
    "stages.grpo.batch.micro_batch=4", "stages.grpo.samples_per_prompt=2",
    "stages.grpo.num_problems=16", "stages.grpo.sampling.max_new_tokens=4",
]  # fmt: skip
SETS = {"@small": SMALL, "@quick": QUICK, "@rl": REINFORCE}


def blocks(page: Path, evaluate: Callable[[Example], None]) -> list[Example]:
    """The fenced blocks of a page, in order."""

    def parser(document: Document) -> Iterator[Region]:
        for region in FencedCodeBlockLexer(language=r"[^\n]*")(document):
            language = region.lexemes["language"].strip()
            if not language.startswith("{"):  # a directive of Sphinx
                region.parsed = (language, str(region.lexemes["source"]))
                region.evaluator = evaluate
                yield region

    return list(Document.parse(str(page), parser).examples())


def marks(text: str) -> dict[str, str]:
    """The comments at the end of what stands before a block."""
    found: dict[str, str] = {}
    while match := COMMENT.search(text[text.rstrip().rfind("\n") + 1 :]):
        found[match["name"]] = match["value"] or ""
        text = text[: text.rstrip().rfind("\n") + 1]
    return found


def train(recipe: Any, overrides: Sequence[str], token: str = "") -> dict[str, Any]:
    """One rank of a run, in the pool."""
    return run_rank(load_config(recipe, overrides), token)


class Trial:
    """In place of a sweep's `Running`, which starts processes: it has ended when it is made."""

    pruned, seconds = False, 0.0

    def __init__(
        self, train: Callable[..., Any], trial: Any, slot: Any, command: list[str]
    ) -> None:
        self.trial, self.slot = trial, slot
        recipe, *words, _, ranks = command[4:]
        train(recipe, words, world=int(ranks))
        write_ending(trial.folder, 0, "done")

    def poll(self) -> int:
        """Its exit code."""
        return 0

    def kill(self) -> None:
        """There is nothing to kill."""


class Page:
    """What a page's blocks share."""

    def __init__(self, folder: Path, ranks: RankPool, request: pytest.FixtureRequest) -> None:
        self.folder, self.ranks, self.request = folder, ranks, request
        self.namespace: dict[str, Any] = {"__name__": "page"}
        self.printed = ""
        self.monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
        self.monkeypatch.chdir(folder)
        self.monkeypatch.syspath_prepend(folder)
        self.monkeypatch.setenv("NO_COLOR", "1")
        self.monkeypatch.setattr("shardwise.launch.train.launch_local", self._launch)
        self.monkeypatch.setattr("shardwise.launch.train.train_rank", self._train)
        self.monkeypatch.setattr(
            "shardwise.sweep.run.Running", functools.partial(Trial, self._train)
        )

    def _launch(self, target: str, args: list[Any], nproc: int, *_: Any) -> None:
        """In place of `launch_local`, which starts fresh processes."""
        self._train(*args, world=nproc)

    def _train(
        self, recipe: Any, overrides: Sequence[str] = (), token: str = "", world: int = 1
    ) -> dict[str, Any]:
        """In place of `train_rank`, which is one of them."""
        loaded = load_config(recipe, overrides)
        preflight(loaded.config, world, loaded.provenance)
        summary: dict[str, Any]
        summary, *_ = self.ranks.run(train, recipe, list(overrides), token, world=world)
        page = report(loaded.config.directory)
        terminal.say("\n".join([*summary_lines(summary), f"report: {page}"]))
        return summary

    def evaluate(self, example: Example) -> None:
        """Run one block. Raises AssertionError if it is not as the page says."""
        language, source = example.parsed
        before = example.document.text[: example.start]
        said = marks(before)
        unknown = said.keys() - NAMES
        assert not unknown, f"unknown comments: {unknown}"
        if "given" in said:
            for name in said["given"].split():
                self.request.getfixturevalue("given")(name, self.folder)
        if "no-run" in said:
            assert len(said["no-run"]) > 8, "say why it is not run"
            return
        prose = re.sub(r"(\s*<!--[^\n]*-->)+\s*$", "", before).rstrip()
        named = None if language in ("sh", "text") else NAMED.search(prose)
        if named:
            file = self.folder / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        if language in WRITTEN_ONLY:
            return
        getattr(self, f"_{language}")(source, said, named[1] if named else "")

    def _sh(self, source: str, said: dict[str, str], _: str) -> None:
        extra = [
            w for word in shlex.split(said.get("run with", "")) for w in SETS.get(word, [word])
        ]
        lines = [line for line in source.replace("\\\n", " ").splitlines() if line.strip()]
        commands = [line for line in lines if not line.lstrip().startswith("#")]
        self.printed = ""
        for number, line in enumerate(commands, 1):
            expected = int(said.get("exit code", "0")) if number == len(commands) else 0
            code, text = self._command(line, extra, fresh="fresh" in said)
            self.printed += text
            assert code == expected, f"exit code {code} of: {line}\n{text}"

    def _command(self, line: str, extra: list[str], fresh: bool) -> tuple[int, str]:
        words = shlex.split(line, comments=True)
        if words[0] != "shardwise" or fresh:
            line = " ".join([line, *map(shlex.quote, extra)])
            done = subprocess.run(
                ["sh", "-ec", line], capture_output=True, text=True, env=self._environment()
            )
            return done.returncode, done.stdout + done.stderr
        words = [os.path.expandvars(word) for word in words]
        self.monkeypatch.setattr(sys, "argv", [*words, *extra])
        capture = self.request.getfixturevalue("capfd")
        capture.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), "".join(capture.readouterr())

    def _environment(self) -> dict[str, str]:
        """Of a fresh process: this interpreter's commands, and what the page has installed."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder / "site")}

    def _python(self, source: str, said: dict[str, str], named: str) -> None:
        if named:
            return
        known = set(self.namespace)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(source, "page", "exec"), self.namespace)  # noqa: S102
            for name in [n for n in self.namespace if n not in known and n.startswith("test_")]:
                test = self.namespace[name]
                asked = test.__code__.co_varnames[: test.__code__.co_argcount]
                test(**{fixture: self.request.getfixturevalue(fixture) for fixture in asked})
        self.printed = out.getvalue()

    def _yaml(self, source: str, said: dict[str, str], named: str) -> None:
        data = yaml12.parse(source, "page").data
        if named and "fresh" in said:  # the commands behind it know more than this process
            return
        if "recipe" in data:
            file = self.folder / (named or "a_sweep.yaml")
            file.write_text(source)
            make_plan(load_sweep(file))
            return
        if "jobs" in data:  # a workflow of GitHub's
            self._workflow(data, said)
            return
        if "shared" in data:
            load_profile(self.folder / named)
            return
        errors = []
        for recipe in as_recipes(data):
            try:
                load_config(recipe)
                return
            except ValueError as error:
                errors.append(f"{error}")
        raise AssertionError("\n".join(errors))

    def _json(self, source: str, said: dict[str, str], named: str) -> None:
        lines = source.strip().splitlines()
        try:
            json.loads(source)
        except ValueError:
            assert all(isinstance(json.loads(line), dict) for line in lines)

    def _workflow(self, data: Any, said: dict[str, str]) -> None:
        """Its commands of ours, and that what it keeps was written."""
        steps = [step for job in data["jobs"].values() for step in job["steps"]]
        for command in (step["run"] for step in steps if "run" in step):
            if command.startswith("shardwise "):
                self._sh(command, said, "")
        kept = [s["with"]["path"] for s in steps if "upload-artifact" in s.get("uses", "")]
        assert all((self.folder / path).is_file() for path in kept)

    def _text(self, source: str, said: dict[str, str], _: str) -> None:
        """Its lines were printed in this order, others between them or none."""
        lines = (r"\s+".join(map(re.escape, line.split())) for line in source.splitlines())
        pattern = ".*?".join(lines).replace(re.escape("..."), ".*?")
        assert re.search(pattern, self.printed, re.DOTALL), (
            f"not printed:\n{source}\n{self.printed}"
        )


def as_recipes(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The recipes that a block may be: itself, sections of one, or of one of its stages."""
    registry.discover()
    model = {"family": "llama", "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    model |= {"num_kv_heads": 2, "ffn_size": 64, "max_seq_len": 512}
    if data.keys() <= RunConfig.model_fields.keys():
        stage = {"kind": "pretrain", "steps": 100}
        yield {"model": model, "stages": [stage], **data}
    for cls in registry.STAGE_CONFIGS.values():
        if data.keys() <= cls.model_fields.keys():
            yield {"model": model, "stages": [{**_small(cls), **data}]}


def _small(cls: type[BaseModel]) -> dict[str, Any]:
    return minimal(cls)  # type: ignore[arg-type]  # a stage's config is a Section

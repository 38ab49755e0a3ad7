"""The table of verdicts, what `--explain` adds to it, and what a terminal shows meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwise.cli.verify import HEADER, Table, explanation, row
from shardwise.verify.verdict import Verdict
from tests.cli.conftest import Command, write_recipe

WORST = {"loss": 0.5, "metric": 0.75, "forward pass": 0.25, "logged": 0.125, "weight": 2.0}


def verdict(**fields: object) -> Verdict:
    base = Verdict(
        "pretrain", "dp2", "fp64", WORST, 1.25, counts=dict.fromkeys(WORST, 3), shape="2 layers"
    )
    return Verdict(**(vars(base) | fields))


def test_every_kind_has_a_column() -> None:
    """Kinds that no column names, of stages from elsewhere too, stand under calls."""
    cells = dict(zip(HEADER.split()[3:], row(verdict()).split()[3:]))
    assert cells["loss"] == "7.5e-01" and cells["weights"] == "2.0e+00"
    assert cells["calls"] == "2.5e-01" and cells["run"] == "1.2e-01" and cells["norm"] == "-"
    assert row(verdict(problem="it raised")).splitlines()[1].strip() == "it raised"


def test_an_explanation_says_what_was_run_given_up_and_compared() -> None:
    text = explanation(verdict(given_up=("layers: several, in the recipe 3",)))
    shape, fact, compared = (line.strip() for line in text.splitlines())
    assert shape == "run: 2 layers" and fact.startswith("given up: layers: several")
    assert "3 of forward pass (at most 2.5e-01)" in compared
    assert "nothing" in explanation(verdict(worst={}, counts={}))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_what_is_tried(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    else:
        monkeypatch.delenv("FORCE_COLOR", raising=False)
    with Table(explain=False, silent=False) as table:
        table.begin("pretrain dp2 in fp64, 1 of 2")
        table.tell(verdict())
        table.begin("pretrain dp2 in bf16, 2 of 2")
        table.tell(verdict())
    out, err = capsys.readouterr()
    assert out.splitlines() == [HEADER, row(verdict()), row(verdict())]
    assert ("dp2 in bf16, 2 of 2" in err) == terminal
    with Table(explain=True, silent=True) as table:
        table.tell(verdict())
    assert capsys.readouterr().out == ""


def test_updates_alone_explained(shardwise: Command, tmp_path: Path) -> None:
    recipe, file = write_recipe(tmp_path), tmp_path / "verify.json"
    code, out, err = shardwise(
        "verify", recipe, "-l", "tp2", "--updates-only", "--explain", "--json", file
    )
    assert code == 0, out + err
    assert "run: " in out and " of gradient (at most " in out
    first, second = json.loads(file.read_text())["verdicts"]
    assert first["counts"]["gradient"] > 5 and "generated tokens" not in second["counts"]
    assert first["shape"]

"""`shardwise verify`: the table of verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from shardwise.cli.output import emit, write_file
from shardwise.errors import CheckFailed, UserError
from shardwise.terminal import printable, say
from shardwise.verify.report import document, junit

if TYPE_CHECKING:
    from shardwise.verify.verdict import Verdict, VerifyReport

# Columns of the table: the kinds of values, some of them together, and their headings.
_COLUMNS = {
    "initial": ("initial",),
    "calls": (),  # what is in no other: forward passes, and what a stage makes of them
    "scales": ("amax", "scale", "history", "sentinel"),
    "loss": ("loss", "metric"),
    "gradient": ("gradient",),
    "norm": ("clip norm",),
    "weights": ("weight",),
    "moments": ("moment",),
    "run": ("sample", "learning rate", "logged", "event"),
    "generation": (
        *("generated tokens", "generated logprobs", "evaluation"),
        *("version", "tokens", "logprobs", "scores", "tree", "rows"),  # of jobs
    ),
}
_COLUMN_OF = {kind: column for column, kinds in _COLUMNS.items() for kind in kinds}
HEADER = f"{'stage':<12} {'layout':<36} {'precision':<9} " + " ".join(
    f"{name:>10}" for name in _COLUMNS
)


def row(verdict: Verdict) -> str:
    """One line: the worst error of each kind over its bound (at most 1), and the verdict."""
    worst: dict[str, float] = {}
    for kind, ratio in verdict.worst.items():
        column = _COLUMN_OF.get(kind, "calls")
        worst[column] = max(ratio, worst.get(column, 0.0))
    cells = [f"{worst[c]:>10.1e}" if c in worst else f"{'-':>10}" for c in _COLUMNS]
    head = f"{verdict.stage:<12} {verdict.layout:<36} {verdict.precision:<9}"
    line = f"{head} {' '.join(cells)}  {'ok' if verdict.passed else 'FAIL'} {verdict.seconds:.1f} s"
    return line if verdict.passed else f"{line}\n    {verdict.sentence()}"


def explanation(verdict: Verdict) -> str:
    """What was run for a verdict, and how much of each kind was compared."""
    lines = [f"run: {verdict.shape}"]
    lines += [f"given up: {fact}" for fact in verdict.given_up]
    kinds = [
        f"{count} of {kind} (at most {verdict.worst[kind]:.1e})"
        for kind, count in verdict.counts.items()
    ]
    lines.append(f"compared, error over bound: {', '.join(kinds) or 'nothing'}")
    return "\n".join(f"    {line}" for line in lines)


class Table:
    """Rows as verdicts come, and on a terminal what is being tried. A context manager."""

    def __init__(self, explain: bool, silent: bool) -> None:
        self.explain, self.silent = explain, silent
        self.console = Console(stderr=True)
        self.status = self.console.status("")
        self.told = False

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def begin(self, what: str) -> None:
        """Elsewhere than on a terminal, rows are the progress."""
        if self.console.is_terminal:
            self.status.update(Text(printable(what)))
            self.status.start()

    def note(self, text: str) -> None:
        """Above the table."""
        if not self.silent:
            say(text)

    def tell(self, verdict: Verdict) -> None:
        """A row, in a place of its own: with ``--json -``, stdout is the document's."""
        self.status.stop()
        if self.silent:
            return
        lines = [] if self.told else [HEADER]
        lines.append(row(verdict))
        if self.explain:
            lines.append(explanation(verdict))
        say("\n".join(lines))
        self.told = True


def show(report: VerifyReport, json: str | None, junit_file: str | None, name: str) -> None:
    """The conclusion of recipe ``name``; raises CheckFailed when a layout computes something else.

    And UserError when all others pass, but one that was asked for by name cannot be.
    """
    lines = [f"cannot be: {layout}: {reason}" for layout, reason in report.refused.items()]
    failed = [v for v in report.verdicts if not v.passed]
    count = len(report.verdicts)
    if not count:
        lines.append("nothing was compared: no layout asked for can be")
    elif not failed:
        lines.append(f"{count} of {count} compute what one process computes, within rounding")
    emit(document(report), "\n".join(lines), json)
    if junit_file is not None:
        write_file("--junit", junit_file, junit(report, name))
    impossible = ", ".join(report.impossible)
    if not count and not impossible:
        raise CheckFailed("no layout could be tried")
    if failed:
        names = ", ".join(dict.fromkeys(f"{v.layout} ({v.stage})" for v in failed))
        raise CheckFailed(f"{len(failed)} of {count} differ from one process: {names}")
    if impossible:
        raise UserError(
            f"{len(report.impossible)} of the layouts asked for cannot be: {impossible}"
        )

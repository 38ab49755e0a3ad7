"""`shardwise verify`: the table of verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardwise.cli.output import emit, write_file
from shardwise.errors import CheckFailed, UserError
from shardwise.verify.report import document, junit

if TYPE_CHECKING:
    from shardwise.verify.run import Verdict, VerifyReport

# Columns of the table: the kinds of values, some of them together, and their headings.
_COLUMNS = {
    "initial": ("initial",),
    "rollout": ("old_logprobs", "ref_logprobs", "values", "model_score", "advantages", "returns"),
    "scales": ("amax", "scale", "history", "sentinel"),
    "loss": ("loss", "metric"),
    "gradient": ("gradient",),
    "norm": ("clip norm",),
    "weights": ("weight",),
    "moments": ("moment",),
    "generation": ("generated tokens", "generated logprobs"),
}
HEADER = f"{'stage':<12} {'layout':<36} {'precision':<9} " + " ".join(
    f"{name:>10}" for name in _COLUMNS
)


def row(verdict: Verdict) -> str:
    """One line: the worst error of each kind over its bound (at most 1), and the verdict."""
    cells = []
    for kinds in _COLUMNS.values():
        known = [verdict.worst[k] for k in kinds if k in verdict.worst]
        cells.append(f"{max(known):>10.1e}" if known else f"{'-':>10}")
    head = f"{verdict.stage:<12} {verdict.layout:<36} {verdict.precision:<9}"
    line = f"{head} {' '.join(cells)}  {'ok' if verdict.passed else 'FAIL'} {verdict.seconds:.1f} s"
    return line if verdict.passed else f"{line}\n    {verdict.sentence()}"


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

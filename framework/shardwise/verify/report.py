"""A report of verify for machines: one JSON document, or JUnit's XML for continuous integration."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from shardwise.terminal import printable

if TYPE_CHECKING:
    from shardwise.verify.verdict import Verdict, VerifyReport

# What XML 1.0 cannot hold even when escaped; `printable` has written out the rest.
_NOT_IN_XML = re.compile("[\ufffe\uffff]")


def document(report: VerifyReport) -> dict[str, Any]:
    """All verdicts with their sentences, and the layouts that cannot be with their reasons."""
    return {
        "passed": report.passed,
        "refused": report.refused,
        "notes": list(report.notes),
        "verdicts": [
            {**vars(v), "passed": v.passed, "sentence": v.sentence()} for v in report.verdicts
        ],
    }


def junit(report: VerifyReport, name: str) -> str:
    """JUnit's XML: a test case a verdict, by stage; ``name`` is the suite's (the recipe's).

    A layout that differs is a failure with its sentence. One that cannot be is skipped with the
    reason, or an error if it was asked for by name, as the exit code has it.
    """
    suite = ElementTree.Element("testsuite", {"name": _text(name)})
    for verdict in report.verdicts:
        case = _case(suite, verdict.stage, f"{verdict.layout} {verdict.precision}", verdict)
        if not verdict.passed:
            ElementTree.SubElement(case, "failure", {"message": _text(verdict.sentence())})
    for layout, reason in report.refused.items():
        kind = "error" if layout in report.impossible else "skipped"
        case = _case(suite, "layouts that cannot be", layout)
        ElementTree.SubElement(case, kind, {"message": _text(reason)})
    totals = {"tests": "", "failures": "/failure", "errors": "/error", "skipped": "/skipped"}
    for total, kind in totals.items():
        suite.set(total, str(len(suite.findall(f"testcase{kind}"))))
    suite.set("time", f"{sum(v.seconds for v in report.verdicts):.3f}")
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _case(
    suite: ElementTree.Element, group: str, name: str, verdict: Verdict | None = None
) -> ElementTree.Element:
    seconds = 0.0 if verdict is None else verdict.seconds
    attributes = {"classname": _text(group), "name": _text(name), "time": f"{seconds:.3f}"}
    return ElementTree.SubElement(suite, "testcase", attributes)


def _text(value: str) -> str:
    return _NOT_IN_XML.sub("?", printable(value))

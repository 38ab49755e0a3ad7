"""What verify writes for machines."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from shardwise.cli.output import plain
from shardwise.verify.report import document, junit
from shardwise.verify.verdict import Verdict, VerifyReport


def _report() -> VerifyReport:
    passed = Verdict("pretrain", "tp2", "fp64", {"loss": 0.5}, 1.25)
    failed = Verdict("sft", "dp2", "bf16", {}, 2.0, problem="rank 1 raised <&\x1b\ufffe> in f")
    return VerifyReport([passed, failed], {"tp8": "8 heads", "pp9": "2 layers"}, ("tp8",))


def test_junit_has_a_case_for_each_verdict_and_layout() -> None:
    text = junit(_report(), "a recipe")
    suite = ElementTree.fromstring(text)
    totals = {k: suite.get(k) for k in ("name", "tests", "failures", "errors", "skipped", "time")}
    assert totals == {
        "name": "a recipe", "tests": "4", "failures": "1", "errors": "1", "skipped": "1",
        "time": "3.250",
    }  # fmt: skip
    passed, failed, impossible, skipped = suite
    assert (passed.get("classname"), passed.get("name")) == ("pretrain", "tp2 fp64")
    assert passed.get("time") == "1.250" and len(passed) == 0
    assert [c.tag for c in (failed[0], impossible[0], skipped[0])] == [
        "failure", "error", "skipped"
    ]  # fmt: skip
    assert failed[0].get("message") == r"rank 1 raised <&\x1b?> in f"
    assert impossible[0].get("message") == "8 heads" and skipped.get("name") == "pp9"


def test_the_document_is_json_and_has_the_sentences() -> None:
    found = json.loads(json.dumps(plain(document(_report()))))
    assert not found["passed"] and found["refused"]["tp8"] == "8 heads"
    assert [v["passed"] for v in found["verdicts"]] == [True, False]
    assert found["verdicts"][1]["sentence"].startswith("rank 1 raised")

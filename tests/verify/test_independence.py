"""Documents of one row do not depend on each other, and what makes them do is caught and named."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import UserError
from shardwise.verify import suite
from shardwise.verify.independence import examine, leaks_of
from shardwise.verify.roles import world_of
from shardwise.verify.run import INDEPENDENCE, verify
from shardwise.verify.verdict import Verdict
from shardwise.verify.verifier import SINGLE, Verifier
from tests.cli.conftest import Command, shardwise, write_recipe  # noqa: F401  # a fixture
from tests.support.daily import daily
from tests.support.pool import RankPool
from tests.verify.edits import Edit, run_edited


def recipe(**model: Any) -> dict[str, Any]:
    """Rows of several short documents that a ring's ranks do not divide; trees of answers."""
    made = suite.recipe("llama")
    made["model"] |= {"num_layers": 2, "num_heads": 4, **model}
    batch = {"global_batch": 4, "micro_batch": 2, "seq_len": 50}
    stages = {s["kind"]: s | {"steps": 2, "batch": batch} for s in made["stages"]}
    made["stages"] = [stages["pretrain"], stages["reward"], stages["ppo"]]
    return made


RECIPES = {
    "documents": recipe(qk_norm=True),
    "windows": recipe(sliding_window=20, window_start_layer=1),
}


@pytest.fixture(scope="module")
def verifiers(ranks: RankPool) -> Iterator[dict[str, Verifier]]:
    made = {name: Verifier(recipe, ranks) for name, recipe in RECIPES.items()}
    yield made
    for verifier in made.values():
        verifier.close()


@dataclasses.dataclass(frozen=True)
class Bug:
    """Where it shows, and what is said first: a kind of value and words of the reason."""

    edit: Edit
    layout: str
    kind: str
    why: str
    stage: str = "pretrain"
    recipe: str = "documents"


ATTENTION, CONTEXT, INPUTS = "ops/attention.py", "parallel/context.py", "engines/inputs.py"
BUGS = {
    "plain_masks_without_segments": Bug(
        Edit(
            ATTENTION,
            "visible(segment_ids_BT[:, None, :, None], segment_ids_BT[:, None, None])",
            "True",
        ),
        SINGLE,
        "output",
        "has other tokens",
    ),
    "ring_masks_without_segments": Bug(
        Edit(CONTEXT, "plain.visible(query[:, None, :, None], key[:, None, None])", "True"),
        "cp2.ring",
        "output",
        "has other tokens",
    ),
    "ulysses_masks_without_segments": Bug(
        Edit(
            CONTEXT,
            "q.dtype, mask.segment_ids_BT, mask.window)",
            "q.dtype, None, mask.window)",
        ),
        "cp2.ulysses",
        "output",
        "has other tokens",
    ),
    "segments_lost_where_a_window_ends": Bug(
        Edit(
            ATTENTION,
            "    if segment_ids_BT is not None:\n        allowed",
            "    if segment_ids_BT is not None and window is None:\n        allowed",
        ),
        "tp2",
        "output",
        "has other tokens",
        recipe="windows",
    ),
    "positions_that_go_on": Bug(
        Edit("data/packing.py", "np.arange(T) - cuts[segment_ids]", "np.arange(T)"),
        SINGLE,
        "position",
        "not 0",
    ),
    "positions_of_the_row": Bug(
        Edit(
            INPUTS,
            '"position_ids_BT": self.own(batch.position_ids_BT)',
            '"position_ids_BT": self.own(\n'
            "                torch.arange(self.num_tokens).expand_as(batch.position_ids_BT)\n"
            "            )",
        ),
        "cp2.ring",
        "document",
        "nothing reads them",
    ),
    "padding_that_attends": Bug(
        Edit(INPUTS, "self.pad(segments_BT, PADDING)", "self.pad(segments_BT)"),
        "cp2.ring",
        "output",
        "document 0 of sample",
    ),
    "branches_that_see_each_other": Bug(
        Edit(ATTENTION, "((query == key) | ((key >> BRANCH_SHIFT) == 0))", "(query >= key)"),
        "dp2.zero2",
        "output",
        "branch",
        stage="reward",
    ),
    "backward_pass_without_a_mask": Bug(
        Edit(
            "ops/attention_blocks.py",
            "            attn_mask=_bias(q, block),\n        )\n    )\n    return grads",
            "            attn_mask=None,\n        )\n    )\n    return grads",
        ),
        "cp2.ring",
        "gradient",
        "none of which",
    ),
}


@pytest.mark.parametrize(
    "layout", daily(sorted({b.layout for b in BUGS.values()} | {"pp2.1f1b"}), 0, 1, 2)
)
def test_the_sound_code_is_not_flagged(verifiers: dict[str, Verifier], layout: str) -> None:
    precision = "bf16" if layout == "cp2.ulysses" else "fp64"
    verdict = verifiers["documents"].check_independence("pretrain", layout, precision)
    assert verdict.passed, verdict.sentence()
    assert verdict.counts["output"] > 200 and verdict.counts["gradient"] > 20


def test_roles_on_ranks_of_their_own(verifiers: dict[str, Verifier]) -> None:
    """In bf16, where a position more may be rounded away."""
    layout = "actor=dp1.zero0@0-0,critic=dp1.zero0@1-1,reference=dp1.zero0@1-1"
    verdict = verifiers["documents"].check_independence("ppo", layout, "bf16")
    assert verdict.passed and verdict.counts["gradient"] > 20, verdict.sentence()


@pytest.mark.parametrize("name", daily(BUGS, *range(0, len(BUGS), 2)))
def test_planted_bug_is_caught(name: str, verifiers: dict[str, Verifier], ranks: RankPool) -> None:
    bug = BUGS[name]
    verifier = verifiers[bug.recipe]
    task = verifier.independence_task(verifier.small(bug.stage, bug.layout), bug.layout, "fp64")
    found = leaks_of(ranks.run(run_edited, [bug.edit], examine, task, world=world_of(bug.layout)))
    assert found and found[0].kind == bug.kind, found[:1]
    assert bug.why in found[0].why


def test_a_verdict_tells_document_token_rank_and_who_is_to_blame(
    verifiers: dict[str, Verifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier, bug = verifiers["documents"], BUGS["ring_masks_without_segments"]
    run = verifier.pool.run

    def edited(fn: Any, *args: Any, **options: Any) -> Any:
        return run(run_edited, [bug.edit], fn, *args, **options)

    monkeypatch.setattr(verifier.pool, "run", edited)
    verdict = verifier.check_independence("pretrain", "dp2.zero1.cp2.ring")
    monkeypatch.undo()
    assert not verdict.passed and verdict.worst["output"] > 1
    words = r"output document \d+ of sample \d+, it changes when document 0 of sample \d+ has other"
    assert re.search(words, verdict.sentence()), verdict.sentence()
    assert re.search(r"worst at \[\d+\] held by rank [0-3]; suspect: cp2.ring$", verdict.sentence())


def test_nothing_packed_is_no_pass(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe()
    config |= {"run_dir": str(tmp_path), "engine": {"compile": False, "precision": "fp64"}}
    [sft] = [s for s in suite.recipe("llama")["stages"] if s["kind"] == "sft"]
    sft |= {"batch": {"global_batch": 4, "micro_batch": 2, "seq_len": 160}, "data": {"pack": False}}
    config["stages"] = [sft]
    report = verify(config, [SINGLE], whole=False, pool=ranks, independence=True)
    assert all(v.passed for v in report.verdicts), [v.sentence() for v in report.verdicts]
    assert not report.passed
    assert report.refused == {INDEPENDENCE: "no row of its micro-batches holds several documents"}
    assert report.impossible == (INDEPENDENCE,)
    config["stages"].append(recipe()["stages"][0])
    report = verify(config, [SINGLE], whole=False, pool=ranks, independence=True)
    assert report.passed and report.refused[INDEPENDENCE].startswith("stage sft: no row")
    assert {v.stage for v in report.verdicts if "independence" in v.layout} == {"pretrain"}


def test_the_command_asks_it(
    shardwise: Command,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check(self: Verifier, stage: str, layout: str, precision: str, *_: bool) -> Verdict:
        return Verdict(stage, layout, precision, {}, 0.0)

    def leaks(self: Verifier, stage: str, layout: str, precision: str) -> Verdict:
        return Verdict(stage, f"{layout}, independence", precision, {}, 0.0, problem="it leaks")

    monkeypatch.setattr(Verifier, "check", check)
    monkeypatch.setattr(Verifier, "check_independence", leaks)
    config = write_recipe(tmp_path)
    command = ("verify", config, "engine.precision=fp64", "-l", "tp2", "--updates-only")
    assert shardwise(*command)[0] == 0
    code, out, err = shardwise(*command, "--independence")
    assert code == 1 and "it leaks" in out
    assert "1 of 2 differ from one process: tp2, independence (pretrain)" in err


def test_scales_that_documents_share_are_told(ranks: RankPool) -> None:
    config = recipe()
    config["engine"] |= {"fp8": {"recipe": "current", "first_layers": 0}}
    verifier = Verifier(config, ranks)
    with pytest.raises(UserError, match="scales that documents share"):
        verifier.check_independence("pretrain", SINGLE)
    verifier.close()

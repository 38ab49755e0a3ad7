"""What the shell offers: commands, options, stages, layouts, keys and their values."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command, write_recipe


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ver", {"verify"}),
        ("config exp", {"explain"}),
        ("train RECIPE --np", {"--nproc"}),
        ("init model data --stage s", {"sft"}),
        ("convert a b --to pe", {"peft"}),
        ("verify RECIPE --stage ", {"pretrain"}),
        ("verify RECIPE --engine m", {"megatron"}),
        ("verify RECIPE --layout s", {"suite"}),
        ("verify RECIPE --layout dp2.z", {"dp2.zero0", "dp2.zero1", "dp2.zero2", "dp2.zero3"}),
        ("verify RECIPE --layout tp2.s", {"tp2.sp"}),
        ("verify RECIPE --layout pp2.zb", {"pp2.zbv"}),
        ("verify RECIPE --layout pp2.zbv.1", set()),
        ("config explain stages.sft.batch.s", {"stages.sft.batch.seq_len"}),
        ("config explain stages.nothing.b", set()),
        ("train RECIPE stages.", {"stages.pretrain."}),
        ("train RECIPE stages.pretrain.bat", {"stages.pretrain.batch."}),
        ("train RECIPE stages.pretrain.batch.s", {"stages.pretrain.batch.seq_len="}),
        ("train RECIPE engine.precision=b", {"engine.precision=bf16"}),
        ("train RECIPE evaluate_start=", {"evaluate_start=true", "evaluate_start=false"}),
        ("train nothing.yaml stages.", set()),
    ],
)
def test_the_shell_is_offered(
    line: str,
    offered: set[str],
    shardwise: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = f"shardwise {line}".replace("RECIPE", str(write_recipe(tmp_path)))
    monkeypatch.setenv("_SHARDWISE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    code, out, err = shardwise()
    assert code == 0 and not err
    assert set(out.split()) == offered
